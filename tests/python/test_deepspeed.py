"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes: the loss curve of one process without it, and a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import distill as program
import pytest
import torch

from .conftest import VOCABULARY, tiny_model, tiny_tokenizer, tiny_words
from .small_run import comparable, lines
from .test_distill_processes import ONE, TORCHRUN, TWO, check_same, launched, words

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, of a student whose head, untied, has more rows than the teacher's."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "asked.jsonl").write_text("".join(f'{{"prompt": "w{i} w9", "answer": "w{i}"}}\n' for i in range(5, 9)))
    torch.manual_seed(1)
    student = tiny_model("llama", vocab_size=VOCABULARY + 8)
    student.save_pretrained(folder / "student")
    tiny_tokenizer(tiny_words()).save_pretrained(folder / "student")
    assert program.main(words(folder, "alone", *ONE)) == 0
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_equal_one_and_go_on(stage: int, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # By default ZeRO-3 keeps parameters of less than 100,000 elements whole: all of these.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    (alone / f"{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    run = alone / f"zero{stage}"
    result = launched(TORCHRUN, *words(alone, run.name, *TWO, f"--deepspeed={alone / f'{stage}.json'}"))
    assert result.returncode == 0, result.stderr
    check_same(run, alone / "alone")
    whole = [comparable(line) for line in lines(run)]
    last = run / "checkpoints/entropy-aware/checkpoint-3"
    parts = {2: "zero_pp_rank_?_mp_rank_00_optim_states.pt", 3: "zero_pp_rank_?_mp_rank_00_model_states.pt"}
    assert len(list((last / "global_step3").glob(parts[stage]))) == 2  # shared out indeed
    # As if it had been killed in its third step.
    for late in (run / "student-entropy-aware", last):
        shutil.rmtree(late)
    (run / "results.json").unlink()
    result = launched(TORCHRUN, "--resume", str(run))
    assert result.returncode == 0, result.stderr
    assert "from step 2, as" in result.stdout
    assert [comparable(line) for line in lines(run)] == whole  # byte by byte
    check_same(run, alone / "alone")


@pytest.mark.parametrize(
    ("config", "meaning"),
    [({"gradient_clipping": 0.5}, "gradient_clipping=0.5 vs hf max_grad_norm=1.0"), ({}, "needs a launcher: torchrun")],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    config: dict[str, float], meaning: str, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = json.dumps({"zero_optimization": {"stage": 2}, **config})
    assert program.main(words(alone, "refused", *ONE, f"--deepspeed={given}")) == 2
    said = capsys.readouterr().err
    assert "argument --deepspeed: " in said and meaning in said
    assert not (alone / "refused").exists()
