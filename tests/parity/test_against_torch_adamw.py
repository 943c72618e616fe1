"""Our training step makes the updates that torch.optim.AdamW makes, with torch's clipping and schedules."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from lm.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig  # noqa: E402
from lm.data.packing import Batch  # noqa: E402
from lm.nn.language_model import model_specs, unconstrained  # noqa: E402
from lm.training.budget import Budget  # noqa: E402
from lm.training.optimizer import make_optimizer  # noqa: E402
from lm.training.state import TrainState  # noqa: E402
from lm.training.step import train_step  # noqa: E402

from .peers import GPT2, LLAMA, difference, mean_nll, resolved, their_logits, weights  # noqa: E402

pytestmark = pytest.mark.parity

STEPS, ROWS, LENGTH, VOCABULARY = 10, 4, 19, 53
ADAMW = OptimizerConfig(
    learning_rate=3e-3,
    warmup_steps=3,
    final_learning_rate=0.1,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-5,
    weight_decay=0.2,
    clip_norm=3.0,
)

# Of losses, norms and learning rates, relative: float32, another order of summation, passed on by ten updates.
TOLERANCE = 1e-5
# Of how far a parameter has moved, relative to the largest move in its array. Adam divides a gradient by its own size,
# which makes an update of the rounding where that is near 0: hence this tolerance, and an epsilon above the rounding.
MOVE_TOLERANCE = 1e-3


def run_config(family, micro_batches: int = 1, **optimizer) -> RunConfig:
    model = dataclasses.replace(resolved(family.config, VOCABULARY, LENGTH), num_layers=1, vocab_multiple=1)
    return RunConfig(
        model=model,
        data=DataConfig(context=LENGTH),
        training=TrainingConfig(steps=STEPS, batch_size=ROWS, gradient_accumulation=micro_batches),
        optimizer=dataclasses.replace(ADAMW, **optimizer),
    )


def batches() -> list[Batch]:
    """Rows of which some end in padding."""
    made = []
    for step in range(STEPS):
        ids = np.random.default_rng(step).zipf(1.5, (ROWS, LENGTH + 1)).astype(np.int32) % VOCABULARY
        weights_BT = np.ones((ROWS, LENGTH), np.float32)
        weights_BT[0, LENGTH - step :] = 0
        positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), weights_BT.shape)
        made.append(Batch(ids[:, :-1], ids[:, 1:], weights_BT, np.ones_like(positions_BT), positions_BT))
    return made


def train_theirs(model, cfg: OptimizerConfig, *, decay_all: bool = False):
    """Losses, gradient norms and learning rates of every step, as nanoGPT trains: matrices and tables decay."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": cfg.weight_decay if decay_all else 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.epsilon)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / cfg.warmup_steps, 1.0, cfg.warmup_steps - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, STEPS - cfg.warmup_steps, cfg.learning_rate * cfg.final_learning_rate
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [cfg.warmup_steps])
    records = []
    for batch in batches():
        optimizer.zero_grad()
        targets_BT = np.where(batch.weights_BT > 0, batch.targets_BT, -100)
        loss = mean_nll(their_logits(model, batch.tokens_BT), targets_BT)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
        records.append((loss.item(), norm.item(), schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return np.array(records).T


@functools.cache
def train_ours(family, cfg: RunConfig):
    """The same of our step, and how far each parameter has moved by its path."""
    params = jax.tree.map(jnp.array, family.params(weights(family.model(cfg.model)), cfg.model))
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model))
    step = jax.jit(functools.partial(train_step, cfg=cfg, optimizer=optimizer, constrain=unconstrained))
    budget = Budget.of(cfg.training, warmup_steps=cfg.optimizer.warmup_steps, tokens_per_step=1, rows_per_epoch=1)
    state, records = TrainState(jnp.int32(0), params, optimizer.init(params)), []
    for index, batch in enumerate(batches()):
        state, sums = step(state, batch, np.float32(budget.progress(index, 0.0)))
        records.append((float(sums.nats / sums.tokens), float(sums.grad_norm), float(sums.learning_rate)))
    return np.array(records).T, by_path(jax.tree.map(jnp.subtract, state.params, params))


def compare(family, cfg: RunConfig, theirs: OptimizerConfig, **options):
    """Largest relative differences of losses, norms and learning rates; of each parameter's move; and their norms."""
    model = family.model(cfg.model)
    before = jax.tree.map(np.copy, family.params(weights(model), cfg.model))
    expected = train_theirs(model, theirs, **options)
    expected_moves = by_path(jax.tree.map(np.subtract, family.params(weights(model), cfg.model), before))
    found, moves = train_ours(family, cfg)
    move_differences = {name: difference(move, expected_moves[name]) for name, move in moves.items()}
    return np.max(np.abs(found - expected) / expected, axis=1), move_differences, expected[1]


def by_path(tree):
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}


EVEN_LLAMA = LLAMA._replace(table_std=0.1)  # small embeddings make large gradients

CASES = {
    "llama": (EVEN_LLAMA, {}, 1),
    "llama-two-micro-batches": (EVEN_LLAMA, {}, 2),
    # Softmax ignores a bias on the keys: its gradient is all rounding.
    "gpt2": (GPT2, {"epsilon": 1e-4, "clip_norm": 2.4}, 1),
}


@pytest.mark.parametrize(("family", "optimizer", "micro_batches"), CASES.values(), ids=CASES)
def test_ten_updates_equal(family, optimizer, micro_batches):
    cfg = run_config(family, micro_batches, **optimizer)
    (loss, norm, rate), moves, norms = compare(family, cfg, cfg.optimizer)
    assert norms.min() < cfg.optimizer.clip_norm < norms.max(), norms  # some steps are clipped, some aren't
    assert max(loss, norm, rate) < TOLERANCE
    assert max(moves.values()) < MOVE_TOLERANCE, moves


@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.0},
        {"clip_norm": float("inf")},
        {"beta1": 0.8},
        {"beta2": 0.99},
        {"epsilon": 1e-4},
        {"warmup_steps": 2},
        {"final_learning_rate": 0.0},
    ],
    ids=str,
)
def test_updates_differ_from_another_config(change):
    cfg = run_config(EVEN_LLAMA)
    _, moves, _ = compare(EVEN_LLAMA, cfg, dataclasses.replace(cfg.optimizer, **change))
    assert max(moves.values()) > 20 * MOVE_TOLERANCE


def test_updates_differ_where_norms_decay_too():
    cfg = run_config(EVEN_LLAMA)
    _, moves, _ = compare(EVEN_LLAMA, cfg, cfg.optimizer, decay_all=True)
    assert max(value for name, value in moves.items() if "norm" in name) > 20 * MOVE_TOLERANCE
