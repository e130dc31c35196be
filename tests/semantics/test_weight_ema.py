"""``WeightEMA`` on any number of ranks is what one process averages, and that is the formula, written out."""

import copy
import dataclasses

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.utils.data import DataLoader

from lightning_swiftmoe import ExpertRebalancer, SwiftMoEStrategy, WeightEMA
from lightning_swiftmoe.parallel.expert_ops import local_part
from lightning_swiftmoe.virtual import VirtualCluster
from tests.jobs import Job, Net, data, largest_error, make_trainer, our_trainer, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import ALONE, DDP, OURS, SHARDED, check, fit, on

pytestmark = pytest.mark.distributed

EXACT = 1e-12
DECAY = 0.8
VALIDATED = {"val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}


class Sees(Net):
    """Notes validation losses, whether weights came back, the averages at the end and the weights after every step."""

    def __init__(self, job):
        super().__init__(job)
        self.register_buffer("counted", torch.zeros(2))
        self.history = []

    def on_train_batch_start(self, batch, batch_idx):
        self.counted += 1

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.loss(batch).item())
        self.seen.append(self.counted.tolist())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.history) < self.trainer.global_step:
            self.history.append(parts(self))


def parts(module):
    """Copies of what this rank holds, by name, without what another order of hooks would change."""
    return {name: local_part(value).detach().clone() for name, value in module.state_dict().items()}


class Watches(pl.Callback):
    """Stands before ``WeightEMA``."""

    def on_validation_start(self, trainer, pl_module):
        self.before = parts(pl_module)


class Compares(pl.Callback):
    """Stands behind it."""

    def __init__(self, watches, ema):
        self.watches, self.ema = watches, ema

    def on_validation_end(self, trainer, pl_module):
        pl_module.seen.append(same_bits(parts(pl_module), self.watches.before))

    def on_train_end(self, trainer, pl_module):
        pl_module.seen.append(self.ema.state_dict()["averages"])


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def held_out(job):
    """The same batch for everybody."""
    return DataLoader(list(data(dataclasses.replace(job, steps=1))), batch_size=None)


def callbacks(**ema):
    average, watches = WeightEMA(DECAY, **ema), Watches()
    return [watches, average, Compares(watches, average)]


def job_of(module=Sees, trainer=None, **ema):
    trainer = {**VALIDATED, **(trainer or {})}
    return Job(steps=4, optimizer=sgd, module=module, trainer=trainer, callbacks=lambda: callbacks(**ema))


class Frozen(Sees):
    """One expert matrix and one dense weight are."""

    def __init__(self, job):
        super().__init__(job)
        self.inp.weight.requires_grad_(False)
        self.moes[0].experts.up_proj.requires_grad_(False)


class Unfreezes(Frozen):
    """An expert matrix after two steps; another one is frozen then. DDP never reduces what was frozen when it came."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        if self.trainer.global_step == 2:
            self.out.weight.requires_grad_(False)
            self.moes[0].experts.up_proj.requires_grad_(True)
            self.moes[1].experts.up_proj.requires_grad_(False)


class Buffered(Sees):
    """Two buffers without an average, and one that has infinities."""

    def __init__(self, job):
        super().__init__(job)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("steps", torch.tensor(0))


class Tied(Sees):
    """Both layers have the same experts."""

    def __init__(self, job):
        super().__init__(job)
        self.moes[1].experts = self.moes[0].experts


JOBS = {
    "plain": job_of(),
    "accumulated": job_of(trainer={"accumulate_grad_batches": 2}),
    "frozen": job_of(Frozen),
    "unfrozen": job_of(Unfreezes),
    "tied": job_of(Tied),
    "every_2": job_of(every_n_steps=2),
    "from_step_3": job_of(start_step=3),
}


@pytest.mark.parametrize("name", JOBS)
@on(SHARDED)
def test_ranks_equal_one_process(system, name):
    expected = check(system, JOBS[name], EXACT)
    check_seen(expected["seen"])


@on([OURS[0], DDP])
def test_other_systems_equal_one_process(system):
    check_seen(check(system, JOBS["plain"], EXACT)["seen"])


def test_ranks_without_rows():
    """Six share five."""
    check(dataclasses.replace(OURS[1], num_ranks=6), JOBS["plain"], EXACT)


def test_order_among_callbacks_does_not_matter():
    """Biases of routers move when ``ExpertRebalancer`` hears of a step, or before."""
    job = dataclasses.replace(job_of(), slots=5, moe={"bias_update_rate": 0.1}, callbacks=list)
    found = []
    for first in (True, False):
        ema, rebalancer = WeightEMA(DECAY), ExpertRebalancer()
        order = [ema, rebalancer] if first else [rebalancer, ema]
        module = job.module(job)
        make_trainer(job, SwiftMoEStrategy(slots_per_rank=5), callbacks=order).fit(module, data(job))
        found.append(ema.state_dict()["averages"])
    assert found[0]["moes.0.router.expert_bias"].any()
    assert same_bits(*found)


def fit_twice(job):
    """The averages after a second ``fit`` with the same callback, which starts from those of the first."""
    ema = WeightEMA(DECAY)
    module = job.module(job).double()
    for _ in range(2):
        trainer = our_trainer(dataclasses.replace(job, slots=5, callbacks=lambda: [ema]))
        trainer.fit(module, data(job, trainer.global_rank, trainer.world_size))
    return ema.state_dict()["averages"]


def test_a_second_fit_goes_on():
    job = dataclasses.replace(job_of(), module=Net)
    one, two = run_ranks(1, fit_twice, job)[0], run_ranks(2, fit_twice, job)
    assert all(largest_error(averages, one) < EXACT for averages in two)


def check_seen(seen):
    assert True in seen
    assert False not in seen


def test_expert_groups_and_offload():
    job = dataclasses.replace(JOBS["plain"], strategy={"offload_optimizer": True})
    check(dataclasses.replace(OURS[1], group_size=1), job, EXACT)


def written_out(history, decay):
    """``(1 - decay) sum_k decay^(n - k) w_k + decay^(n - 1) w_1`` over k = 2 .. n."""
    first, *later = history
    total = {name: decay ** len(later) * value for name, value in first.items()}
    for age, weights in enumerate(reversed(later)):
        for name, value in weights.items():
            total[name] = total[name] + (1 - decay) * decay**age * value
    return total


@pytest.mark.parametrize(
    ("name", "steps"),
    [("plain", [1, 2, 3, 4]), ("accumulated", [1, 2, 3, 4]), ("every_2", [2, 4]), ("from_step_3", [3, 4])],
)
@pytest.mark.parametrize("virtual", [False, True])
def test_the_formula(name, steps, virtual):
    job = dataclasses.replace(JOBS[name], module=Buffered)
    module, ema = job.module(job).double(), WeightEMA(DECAY, **SETTINGS.get(name, {}))
    cluster = [VirtualCluster(2, 5)] if virtual else []
    make_trainer(job, callbacks=[ema, *cluster]).fit(module, data(job))
    averages = ema.state_dict()["averages"]
    finite = {k: v for k, v in averages.items() if k != "mask"}
    assert set(averages) == {*dict(module.named_parameters()), "counted", "mask"}
    expected = written_out([{k: module.history[step - 1][k] for k in finite} for step in steps], DECAY)
    assert largest_error(finite, expected) < EXACT
    assert torch.equal(averages["mask"], module.mask)


SETTINGS = {"every_2": {"every_n_steps": 2}, "from_step_3": {"start_step": 3}}


def test_frozen_has_no_average_and_unfrozen_starts_anew():
    def averages(name):
        return fit(ALONE, JOBS[name])["seen"][-1]

    assert not {"inp.weight", "moes.0.experts.up_proj"} & averages("frozen").keys()
    job = JOBS["unfrozen"]
    module, ema = job.module(job).double(), WeightEMA(DECAY)
    make_trainer(job, callbacks=[ema]).fit(module, data(job))
    found = ema.state_dict()["averages"]
    assert "moes.1.experts.up_proj" not in found
    name = "moes.0.experts.up_proj"
    expected = written_out([{name: weights[name]} for weights in module.history[2:]], DECAY)
    assert largest_error({name: found[name]}, expected) < EXACT


def test_validation_sees_averages():
    """And only where that is wanted."""
    averaged = fit(ALONE, job_of())["seen"]
    plain = fit(ALONE, job_of(validate=False))["seen"]
    assert averaged[0] == plain[0]  # after one step they are the weights
    assert abs(averaged[-4] - plain[-4]) > 1e-4 * plain[-4]


@pytest.mark.parametrize("strategy", ["auto", SwiftMoEStrategy(slots_per_rank=5)])
def test_averages_are_wider_than_weights(strategy):
    """In bf16 a small step would be lost, and weights still come back bit for bit."""
    job = dataclasses.replace(job_of(), precision="bf16-true")
    module, made = job.module(job), callbacks()
    make_trainer(job, strategy, callbacks=made).fit(module, data(job), held_out(job))
    check_seen(module.seen[:-1])
    averages = module.seen[-1]
    assert {value.dtype for value in averages.values()} == {torch.float32}
    assert averages["out.weight"].bfloat16().float().ne(averages["out.weight"]).any()


class Raises(Sees):
    """In the validation after the third step."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.differed = not same_bits(parts(self), self.history[-1])
        if self.trainer.global_step == 3:
            raise KeyError("validation")


def weights_after_raising(job, trainer_of):
    module = job.module(job).double()
    made = callbacks()
    with pytest.raises(KeyError, match="validation"):
        trainer_of(job, made).fit(module, data(job), held_out(job))
    return module.differed and same_bits(parts(module), made[0].before)


def test_validation_raises():
    job = job_of(Raises)
    assert weights_after_raising(job, lambda job, made: make_trainer(job, callbacks=made))


def raises_on_ranks(job):
    return weights_after_raising(
        job, lambda job, made: our_trainer(dataclasses.replace(job, slots=3, callbacks=lambda: made))
    )


def test_validation_raises_on_ranks():
    assert run_ranks(2, raises_on_ranks, job_of(Raises)) == [True, True]


# -- checkpoints -------------------------------------------------------------------------------------------------------


class SavesAt2(pl.Callback):
    """Before ``WeightEMA`` has averaged the step; or while its averages are validated."""

    def __init__(self, path, validating):
        self.path, self.validating = path, validating

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2 and not self.validating:
            trainer.save_checkpoint(self.path)

    def on_validation_batch_end(self, trainer, *_):
        if trainer.global_step == 2 and self.validating:
            trainer.save_checkpoint(self.path)


def resumable(path=None, validating=False, ema=None):
    ema = ema or WeightEMA(DECAY)
    first = [SavesAt2(path, validating)] if path else []
    return Job(steps=4, slots=5, callbacks=lambda: [*first, ema])


def train_ranks(path=None, resume=None, validating=False):
    """Averages and weights after all steps."""
    ema = WeightEMA(DECAY)
    job = resumable(path, validating, ema)
    module = job.module(job).double()
    train_it(
        our_trainer(job, **(VALIDATED if validating else {})), job, module, resume, ranks=True, validating=validating
    )
    return ema.state_dict()["averages"], module.state_dict()


def train_one(resume=None):
    ema = WeightEMA(DECAY)
    job = resumable(ema=ema)
    module = job.module(job).double()
    train_it(make_trainer(job, callbacks=[ema]), job, module, resume)
    return ema.state_dict()["averages"], module.state_dict()


def train_it(trainer, job, module, resume, *, ranks=False, validating=False):
    rank, num_ranks = (trainer.global_rank, trainer.world_size) if ranks else (0, 1)
    trainer.fit(module, data(job, rank, num_ranks), held_out(job) if validating else None, ckpt_path=resume)


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A file of two ranks, and what they made of all steps."""
    path = str(tmp_path_factory.mktemp("ema") / "half.ckpt")
    return path, run_ranks(2, train_ranks, path)


def test_resumes_bit_for_bit(half_way):
    path, whole = half_way
    for resumed, uninterrupted in zip(run_ranks(2, train_ranks, None, path), whole, strict=True):
        assert all(same_bits(a, b) for a, b in zip(resumed, uninterrupted, strict=True))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_resumes_on_another_number_of_ranks(half_way, num_ranks):
    path, whole = half_way
    for averages, weights in run_ranks(num_ranks, train_ranks, None, path):
        assert largest_error(averages, whole[0][0]) < EXACT
        assert largest_error(weights, whole[0][1]) < EXACT


def test_resumes_without_the_strategy(half_way):
    path, whole = half_way
    averages, weights = train_one(path)
    assert largest_error(averages, whole[0][0]) < EXACT
    assert largest_error(weights, whole[0][1]) < EXACT
    assert largest_error(averages, weights) > 1e-3


def test_the_file_holds_whole_averages(half_way):
    content = torch.load(half_way[0], weights_only=True)
    ema = WeightEMA()
    ema.load_state_dict(content["callbacks"]["WeightEMA"])
    module = Net(resumable()).double()
    module.load_state_dict(content["state_dict"])
    averaged = copy.deepcopy(module)
    ema.apply_to(averaged)
    assert same_bits(parts(averaged), ema.state_dict()["averages"])
    assert largest_error(parts(averaged), parts(module)) > 1e-3


def test_a_file_saved_while_averages_are_validated_holds_the_weights(half_way, tmp_path):
    path = str(tmp_path / "validating.ckpt")
    run_ranks(2, train_ranks, path, None, True)
    found, expected = (torch.load(file, weights_only=True) for file in (path, half_way[0]))
    assert same_bits(found["state_dict"], expected["state_dict"])
    assert same_bits(*(file["callbacks"]["WeightEMA"]["averages"] for file in (found, expected)))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"decay": 1}, "decay must be a number from 0 to below 1, got 1"),
        ({"decay": -0.1}, "decay must be a number from 0 to below 1, got -0.1"),
        ({"decay": "0.9"}, "decay must be a number from 0 to below 1, got '0.9': write 0.9 without quotes"),
        ({"every_n_steps": 0}, "every_n_steps must be a positive integer, got 0"),
        ({"start_step": -1}, "start_step must be an integer from 0, got -1"),
        ({"validate": 1}, "validate must be True or False, got 1"),
    ],
)
def test_wrong_arguments(wrong, line):
    with pytest.raises(ValueError) as caught:
        WeightEMA(**wrong)
    assert str(caught.value) == line


def test_a_wrong_name():
    with pytest.raises(TypeError, match="unexpected keyword argument 'every_n_step'; did you mean 'every_n_steps'"):
        WeightEMA(every_n_step=2)


def test_nothing_to_apply():
    with pytest.raises(ValueError, match="WeightEMA has no averages"):
        WeightEMA().apply_to(Net(Job()))


@pytest.mark.parametrize(
    ("averages", "line"),
    [
        ({"other": torch.zeros(1)}, "the module of WeightEMA must be one that has 'other', got 'Net'"),
        (
            {"inp.bias": torch.zeros(2)},
            r"the average of 'inp.bias' must be of shape \(6,\), got Tensor of shape \(2,\)",
        ),
    ],
)
def test_averages_of_another_module(averages, line):
    ema = WeightEMA()
    ema.load_state_dict({"averages": averages})
    with pytest.raises(ValueError, match=line):
        ema.apply_to(Net(Job()))


@pytest.mark.parametrize(
    ("strategy", "line"),
    [
        (SwiftMoEStrategy(optimizer_state="bound"), "optimizer_state='bound' moves them.*use optimizer_state="),
        (FSDPStrategy(), "does not know the parts that FSDPStrategy makes of Parameters"),
    ],
)
def test_strategies_with_other_parts(strategy, line):
    with pytest.raises(ValueError, match=line):
        WeightEMA().setup(FakeTrainer(strategy), Net(Job()), "fit")


class FakeTrainer:
    """Has a strategy: FSDP itself asks for a GPU."""

    def __init__(self, strategy):
        self.strategy = strategy
