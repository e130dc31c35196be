"""Whoever looks at the module during ``fit`` sees whole experts: norms, penalties, state dicts, files, averages."""

import copy

import pytest
import torch
from lightning.pytorch.utilities import grad_norm

from tests.jobs import Job, Net, full, sgd
from tests.ranks import run_ranks
from tests.semantics.systems import OURS, SHARDED, alone, check, fit, on, same

pytestmark = pytest.mark.distributed


class LogsNorms(Net):
    """As Lightning's documentation has it."""

    norm_type = 2

    def on_before_optimizer_step(self, optimizer):
        norms = grad_norm(self, norm_type=self.norm_type)
        self.log_dict(norms)
        self.seen.append({name: float(norm) for name, norm in norms.items()})


class LogsMaxima(LogsNorms):
    norm_type = "inf"


@pytest.mark.parametrize("module", [LogsNorms, LogsMaxima])
def test_grad_norm(system, module):
    # Lightning adds the total up in fp32.
    seen = check(system, Job(steps=3, module=module), bound=1e-6)["seen"]
    assert len(seen[0]) == len(list(Net(Job()).parameters())) + 1


class LogsNumbers(Net):
    """Tensors that are numbers go to ``self.log`` as they are."""

    def on_before_optimizer_step(self, optimizer):
        experts = [p for moe in self.moes for p in moe.experts.parameters()]
        self.log("weight", sum(p.square().sum() for p in experts))
        self.log("gradient", torch.stack([p.grad.norm() for p in experts]).max())

    def on_train_end(self):
        self.seen.append({key: self.trainer.callback_metrics[key].item() for key in ("weight", "gradient")})


def test_self_log(system):
    check(system, Job(steps=2, module=LogsNumbers), bound=1e-6)  # logged in fp32


class Penalised(Net):
    """Weight decay as a term of the loss."""

    def penalty(self):
        return sum(p.square().sum() for p in self.parameters())

    def training_step(self, batch, batch_idx):
        penalty = 0.05 * self.penalty()
        self.seen.append(penalty.item())
        return super().training_step(batch, batch_idx) + penalty


class PenalisedByNorms(Penalised):
    def penalty(self):
        return sum(p.norm() for p in self.parameters())


class PenalisedExperts(Penalised):
    """L1, and only where experts are."""

    def penalty(self):
        return sum(p.abs().mean() for name, p in self.named_parameters() if "experts" in name)


class PenalisedDifferences(Penalised):
    """Experts pulled towards their mean."""

    def penalty(self):
        return sum((w - w.mean(0, keepdim=True)).square().sum() for w in (m.experts.down_proj for m in self.moes))


class PenalisedFirst(Penalised):
    """The penalty's number leads the sum."""

    def training_step(self, batch, batch_idx):
        return {"loss": 0.05 * self.penalty() + Net.training_step(self, batch, batch_idx)}


@pytest.mark.parametrize(
    "module", [Penalised, PenalisedByNorms, PenalisedExperts, PenalisedDifferences, PenalisedFirst]
)
def test_penalties_in_the_loss(system, module):
    check(system, Job(steps=3, optimizer=sgd, module=module), without=Net)


def test_penalties_accumulate(system):
    check(system, Job(steps=3, optimizer=sgd, module=Penalised, trainer={"accumulate_grad_batches": 2}))


class PenalisedByHand(Penalised):
    """A backward of its own for the penalty."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) + 0.05 * self.penalty())
        self.manual_backward(self.loss(batch) + 0.01 * self.penalty())
        optimizer.step()
        optimizer.zero_grad()


def test_penalties_by_hand(system):
    check(system, Job(steps=3, optimizer=sgd, module=PenalisedByHand))


class PenalisedLoss(Penalised):
    """The sum stays a plain number."""

    def training_step(self, batch, batch_idx):
        loss = Penalised.training_step(self, batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen += [type(outputs["loss"]), self.trainer.callback_metrics["loss"].item()]


def test_a_penalised_loss_is_an_ordinary_tensor(system):
    check(system, Job(steps=2, module=PenalisedLoss), bound=1e-6)  # logged in fp32


class Dumps(Net):
    """The state dict on every step; its shapes before anybody gathers anything."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        state = self.state_dict()
        self.seen.append({name: list(value.shape) for name, value in state.items()})
        self.seen.append({name: full(value).clone() for name, value in state.items()})
        self.seen.append({name: [*p.shape, p.numel()] for name, p in self.named_parameters()})
        self.seen.append({name: full(v).clone() for name, v in self.moes[1].experts.state_dict().items()})


@pytest.mark.parametrize("moe", [{}, {"shared_ffn_size": 4, "activation": "swiglu"}])
def test_state_dict(system, moe):
    seen = check(system, Job(steps=3, module=Dumps, moe=moe))["seen"]
    assert seen[1].keys() == Net(Job(moe=moe)).state_dict().keys()


class DumpsWithinSteps(Net):
    """Between forward and backward, and in validation."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append({name: full(value).clone() for name, value in self.state_dict().items()})
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.loss(batch).item())
        self.seen.append({name: full(p.detach()).clone() for name, p in self.named_parameters()})


def test_state_dict_within_steps(system):
    trainer = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    check(system, Job(steps=4, module=DumpsWithinSteps, trainer=trainer))


class Saves(Net):
    """``torch.save`` by hand."""

    folder = None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        path = self.folder / f"{self.global_rank}.pt"
        try:
            torch.save(self.state_dict(), path)
        except (RuntimeError, TypeError, ValueError) as error:
            self.seen.append(str(error))
        else:
            self.seen.append(torch.load(path, weights_only=True))


@on(OURS)
def test_torch_save_writes_whole_tensors_or_says_why_not(system, tmp_path):
    job = Job(steps=2, module=type("Saves", (Saves,), {"folder": tmp_path}))
    expected = alone(system, job)["seen"]
    for result in run_ranks(system.num_ranks, fit, system, job):
        assert len(result["seen"]) == 2
        for got, saved in zip(result["seen"], expected, strict=True):
            if isinstance(got, str) and system.num_ranks > 1:
                assert "full_tensor" in got or "save_checkpoint" in got  # the way out
            else:
                same(got, saved, 1e-9, "the file")


class SavesWhole(Saves):
    """What the sentence would recommend."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        path = self.folder / f"{self.global_rank}.pt"
        torch.save({name: full(value) for name, value in self.state_dict().items()}, path)
        self.seen.append(torch.load(path, weights_only=True))


def test_saving_whole_tensors(system, tmp_path):
    check(system, Job(steps=2, module=type("SavesWhole", (SavesWhole,), {"folder": tmp_path})))


class Averages(Net):
    """Three ways to keep an average of the weights."""

    def on_train_start(self):
        self.lerped = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.added = [p.data.clone() for p in self.parameters()]
        self.summed = {name: value.clone() for name, value in self.state_dict().items()}

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for name, p in self.named_parameters():
            self.lerped[name].lerp_(p, 0.1)
        for average, p in zip(self.added, self.parameters(), strict=True):
            average.mul_(0.9).add_(p.data, alpha=0.1)
        state = self.state_dict()
        self.summed = {name: 0.9 * value + 0.1 * state[name] for name, value in self.summed.items()}

    def on_train_end(self):
        self.seen.append({name: full(value) for name, value in self.lerped.items()})
        self.seen.append([full(value) for value in self.added])
        self.seen.append({name: full(value) for name, value in self.summed.items()})


class AveragesForeach(Averages):
    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        torch._foreach_lerp_(list(self.lerped.values()), [p.detach() for p in self.parameters()], 0.1)


@pytest.mark.parametrize("module", [Averages, AveragesForeach])
def test_own_averages(system, module):
    check(system, Job(steps=4, module=module))


class Compares(Net):
    """Equality and closeness are numbers too: every rank must answer alike."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        up = self.moes[0].experts.up_proj.detach()
        last = torch.zeros(up.shape, dtype=up.dtype)
        last[2, -1, 1] = 1  # in the last rank's rows
        for other in (up.clone(), up + last):
            self.seen += [torch.equal(up, other), torch.allclose(up, other)]
            self.seen += [bool((up == other).all()), (up != other).sum().item()]


@on(SHARDED)
def test_comparisons(system):
    seen = check(system, Job(steps=1, module=Compares))["seen"]
    assert seen == [True, True, True, 0, False, False, False, 1]


class LooksAtPieces(Net):
    """What can be had of experts in pieces, and what would need rows."""

    def on_before_optimizer_step(self, optimizer):
        up = self.moes[0].experts.up_proj
        self.seen += [up.sum().item(), up.detach().square().sum().sqrt().item()]
        self.seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))
        for look in (
            lambda: up[2].sum(),
            lambda: up.abs().max(),
            lambda: full(up),
            lambda: up.data.copy_(torch.ones(up.shape)),
            lambda: up.tolist(),
            lambda: up + torch.ones(up.shape),
        ):
            try:
                look()
            except RuntimeError as error:
                self.seen.append(str(error))
            else:
                self.seen.append("had")


@on(SHARDED)
def test_experts_in_pieces_tell_sums_and_refuse_the_rest(system):
    job = Job(steps=1, module=LooksAtPieces, strategy={"optimizer_state": "bound"})
    numbers = alone(system, job)["seen"][:3]
    for result in run_ranks(system.num_ranks, fit, system, job):
        same(result["seen"][:3], numbers, 1e-9, "numbers")
        assert len(result["seen"]) == 9
        assert all("optimizer_state='bound'" in message for message in result["seen"][3:])


class Copies(Net):
    """Values for histograms, and copies for teachers and references."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen += [full(copy.deepcopy(p.detach())) for p in self.parameters()]
        self.seen += [p.detach().cpu().tolist() for p in self.parameters()]


def test_copies_and_lists(system):
    check(system, Job(steps=1, module=Copies))
