# ruff: noqa: E501 (a mutant is a line)
"""What is broken of the adapters to trainers."""

from __future__ import annotations

from .mutant import Mutant

VERL, FIGURES = ("tests/integrations/test_verl.py",), ("tests/integrations/test_transformers.py",)

MUTANTS = [
    Mutant("heads: the base model is taken for the backbone", "backbone_of", "decoder = part.get_decoder()", "decoder = part.base_model", ("tests/integrations/test_transformers.py",)),
    Mutant("integrations: the mixin's labels are not shifted", "compute_loss", 'inputs["labels"][:, 1:]', 'inputs["labels"][:, :-1]'),
    Mutant("integrations: the function's labels are not shifted", "compute_loss_func.loss", "labels=labels[:, 1:]", "labels=labels[:, :-1]"),
    Mutant("integrations: the mixin ignores num_items", "compute_loss", "num_items=num_items_in_batch,\n            vocab_size=self.vocab_size", "num_items=None,\n            vocab_size=self.vocab_size"),
    Mutant("integrations: the function ignores num_items", "compute_loss_func.loss", "num_items=num_items_in_batch,\n            vocab_size=vocab_size", "num_items=None,\n            vocab_size=vocab_size"),
    Mutant("integrations: the mean of gradients divides once more", "compute_loss", "loss * (trainer.accelerator.num_processes // trainer.get_tp_size())", "loss"),
    Mutant("integrations: the first label counts", "DistillationMixin.__init__", "trainer._loss_shifts_labels = trainer.model_accepts_loss_kwargs = True", "trainer.model_accepts_loss_kwargs = True"),
    Mutant("integrations: the mixin computes all logits", "compute_loss", "0 if all_logits else 1", "0"),
    Mutant("integrations: trl's beta from the other end", "effective", "Objective.gkd(beta, temperature)", "Objective.gkd(1 - beta, temperature)"),
    Mutant("integrations: trl's num_items is ignored", "_chunked_divergence_loss", "num_items=num_items_in_batch,", "num_items=None,"),
    Mutant("integrations: trl's batchmean without labels is a mean", "generalized_jsd_loss", "num_items = student_logits.size(0)", "num_items = None"),
    Mutant("integrations: trl logs the teacher's entropy", "_chunked_divergence_loss", "out.student_entropy.sum()", "out.teacher_entropy.sum()"),
    Mutant("integrations: trl stays patched", "patch_trl", "stack.callback(setattr, owner, name, vars(owner)[name])", "pass"),
    Mutant("integrations: threads patch trl as they like", "__enter__", "if not self.lock.acquire(blocking=False):", "if False:"),
    Mutant("integrations: a temperature is dropped silently", "effective", "objective.temperatures != (temperature, temperature)", "False"),
    Mutant("integrations: Liger's beta from the other end", "LigerFusedLinearJSDLoss.__init__", "Objective.gkd(beta, temperature) if", "Objective.gkd(1 - beta, temperature) if"),
    Mutant("integrations: Liger's soft weight is forgotten", "LigerFusedLinearJSDLoss.forward", "self.weight_soft_loss * out.loss", "out.loss"),
    Mutant("integrations: verl's other losses become ours", "compute_topk_loss", "if distillation_config.distillation_loss.loss_mode != name:", "if False:"),
    Mutant("figures: the last micro-batch alone is logged", "Figures.add", "self._sums[training] + sums if training in self._sums else sums", "sums", FIGURES),
    Mutant("figures: they are added up for ever", "Figures.means", "self._sums.pop(training, None)", "self._sums.get(training)", FIGURES),
    Mutant("figures: an evaluation's are training's", "log_with.log_with_figures", "training=not prefix", "training=True", FIGURES),
    Mutant("figures: of one process", "Figures.means", "sums = reduce(", "sums = (", FIGURES),
    Mutant("figures: the mixin counts an evaluation as training", "compute_loss", "self.figures.add(out, model.training)", "self.figures.add(out, True)", FIGURES),
    Mutant("integrations: the mixin ignores how", "compute_loss", "            **self.how,\n", "", FIGURES),
    Mutant("integrations: verl's tokens are those of the row", "verl.token_losses", ".roll(-1)", ".roll(0)", VERL),
    Mutant("integrations: verl's prompts count", "verl.token_losses", 'mask=rows["mask"],', "mask=None,", VERL),
    Mutant("integrations: verl's unknown tokens have a reverse half", "verl.token_losses", "known.to(of_token.dtype) if", "None if", VERL),
    Mutant("integrations: verl's sampled column is an entry of the top k", "verl.token_losses", 'rows["log_probs"][..., :k], rows["ids"][..., :k].long()', 'rows["log_probs"], rows["ids"].long()', VERL),
    Mutant("integrations: verl's policy gradient is let through", "verl.check_settings", "if loss.use_policy_gradient:", "if False:", VERL),
    Mutant("integrations: verl clamps negative losses", "verl.collected", "return losses,", "return losses.clamp_min(0),", VERL),
    Mutant("integrations: verl's responses begin one token late", "verl.packed", "torch.arange(1, n + 1", "torch.arange(0, n", VERL),
]  # fmt: skip
