"""A small task with real ambiguity: pay an amount with a given number of coins, some of which are refused.

    prompt      pay 47 with 4 no 5p 30p :
    answer      20p 27 15p 12 10p 2 2p 0 <eos>

Which coin comes next is usually open (a dozen orders and selections are right), the remainder after it is not. So the
entropy of a good model is high on the first kind of token and near zero on the second, and a checker can say whether an
answer is right. Paying with exactly so many coins takes foresight, which keeps a small model below 100 %.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COINS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50)
LARGEST_AMOUNT = 199
COUNTS = (4, 5, 6)
MOST_REFUSED = 4
LONGEST_ANSWER = 2 * max(COUNTS) + 1  # tokens: a coin and a remainder per step, and the end of the sequence

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


@cache
def ways(amount: int, count: int, accepted: tuple[int, ...]) -> int:
    """In how many ordered ways ``count`` coins of the ``accepted`` kinds make ``amount``."""
    if count == 0:
        return int(amount == 0)
    return sum(ways(amount - coin, count - 1, accepted) for coin in accepted if coin <= amount)


@dataclass(frozen=True)
class Payment:
    """One problem: pay ``amount`` with exactly ``count`` coins, none of them ``refused``."""

    amount: int
    count: int
    refused: tuple[int, ...] = ()

    @property
    def accepted(self) -> tuple[int, ...]:
        return tuple(coin for coin in COINS if coin not in self.refused)

    @property
    def answer_tokens(self) -> int:
        """Of a right answer, with its end-of-sequence token."""
        return 2 * self.count + 1

    @property
    def prompt(self) -> str:
        refused = ["no", *(f"{coin}p" for coin in self.refused)] if self.refused else []
        return " ".join(["pay", str(self.amount), "with", str(self.count), *refused, ":"])

    @classmethod
    def draw(cls, rng: random.Random) -> Payment:
        """A solvable problem."""
        while True:
            refused = tuple(sorted(rng.sample(COINS, rng.randint(0, MOST_REFUSED))))
            payment = cls(rng.randint(10, LARGEST_AMOUNT), rng.choice(COUNTS), refused)
            if ways(payment.amount, payment.count, payment.accepted):
                return payment

    @classmethod
    def parse(cls, prompt: str) -> Payment:
        """The problem that a prompt poses."""
        words = prompt.split()
        return cls(int(words[1]), int(words[3]), tuple(int(word[:-1]) for word in words[5:-1]))

    def draw_answer(self, rng: random.Random) -> str:
        """One right answer, every one of them (order counts) equally likely."""
        rest, words = self.amount, []
        for left in range(self.count - 1, -1, -1):
            fitting = [coin for coin in self.accepted if coin <= rest]
            (coin,) = rng.choices(fitting, [ways(rest - coin, left, self.accepted) for coin in fitting])
            rest -= coin
            words += [f"{coin}p", str(rest)]
        return " ".join(words)

    def accepts(self, answer: str) -> bool:
        """Whether ``answer``, without its end-of-sequence token, is right: coins, remainders, count, nothing left."""
        words = answer.split()
        if len(words) != 2 * self.count:
            return False
        rest, names = self.amount, {f"{coin}p": coin for coin in self.accepted}
        for coin, remainder in zip(words[::2], words[1::2], strict=True):
            if coin not in names or remainder != str(rest - names[coin]):
                return False
            rest -= names[coin]
        return rest == 0


def draw_problems(training: int, held_out: int, seed: int) -> tuple[list[Payment], list[Payment]]:
    """Distinct problems, so that none of the held-out ones is ever trained on."""
    rng = random.Random(seed)
    problems: dict[Payment, None] = {}
    while len(problems) < training + held_out:
        problems[Payment.draw(rng)] = None
    drawn = list(problems)
    return drawn[held_out:], drawn[:held_out]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; prompts are padded on the left."""
    words = [PAD, EOS, UNKNOWN, ":", "pay", "with", "no", *(f"{coin}p" for coin in COINS)]
    words += [str(number) for number in range(LARGEST_AMOUNT + 1)]
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )
