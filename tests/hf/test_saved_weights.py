"""Weights in the folder of a model, read by the ranks that hold them."""

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from lightning_swiftmoe.hf import meta_model, saved_weights
from tests.hf.families import FAMILIES, config_of, model_of
from tests.hf.test_strategy import Causal, data, job_of
from tests.jobs import largest_error, our_trainer
from tests.ranks import run_ranks

THERE = [family for family in FAMILIES if config_of(family) is not None]


def is_of_experts(name, tensor):
    return ".experts." in name and (tensor.dim() == 3 or name.endswith("_proj_bias"))


@pytest.fixture(params=THERE)
def saved(request, tmp_path):
    """A model, and the folder that it was saved to in several files."""
    model = model_of(request.param, "eager", torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return model, tmp_path


def test_every_tensor_in_one_piece_and_by_expert(saved):
    model, folder = saved
    weights = meta_model(folder).swiftmoe_weights
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.whole(name), tensor), name
        if is_of_experts(name, tensor):
            for rows in (slice(None), slice(0, 5), slice(5, 11), slice(11, None), slice(3, 3)):
                chunks = list(weights.chunks(name, rows))
                assert len(chunks) == tensor.shape[0]
                assert torch.equal(torch.cat(chunks), tensor[:, rows]), (name, rows)


class Reader:
    """Counts what is read of a file."""

    def __init__(self, file, counts):
        self.file, self.counts = file, counts

    def keys(self):
        return self.file.keys()

    def get_slice(self, key):
        return ReadSlice(self.file.get_slice(key), key, self.counts)


class ReadSlice:
    def __init__(self, saved, key, counts):
        self.saved, self.key, self.counts = saved, key, counts
        self.get_shape = saved.get_shape

    def __getitem__(self, index):
        result = self.saved[index]
        self.counts[self.key] = self.counts.get(self.key, 0) + result.numel()
        return result


def test_ranks_together_read_every_number_once(saved, monkeypatch):
    model, folder = saved
    counts = {}
    open_file = saved_weights.open_file
    monkeypatch.setattr(saved_weights, "open_file", lambda path: Reader(open_file(path), counts))
    weights = meta_model(folder).swiftmoe_weights
    for name, tensor in model.state_dict().items():
        if is_of_experts(name, tensor):
            counts.clear()
            third = -(-tensor.shape[1] // 3)
            for rank in range(3):
                list(weights.chunks(name, slice(rank * third, (rank + 1) * third)))
            assert sum(counts.values()) == tensor.numel(), name


class FromFolder(Causal):
    """Starts with what is in the folder, before ranks or behind."""

    def __init__(self, job, folder, on_meta):
        super(Causal, self).__init__()
        self.job, self.folder, self.on_meta = job, folder, on_meta
        self.losses, self.gradients, self.seen, self.model = [], [], [], None

    def configure_model(self):
        if self.model is None:
            options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float64}
            if self.on_meta:
                self.model = meta_model(self.folder, **options)
            else:
                self.model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, **options)

    def on_before_optimizer_step(self, optimizer):
        pass


def train(job, folder, on_meta, path):
    trainer, module = our_trainer(job), FromFolder(job, folder, on_meta)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    trainer.save_checkpoint(path)
    trainer.strategy.gather_experts()
    if dist.get_rank() == 0:
        module.model.save_pretrained(f"{path}-folder")
    (metrics,) = trainer.validate(module, data(job, dist.get_rank(), dist.get_world_size()), verbose=False)
    return metrics


@pytest.mark.distributed
@pytest.mark.parametrize("state", ["decoupled", "bound"])
@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("olmoe", marks=pytest.mark.exhaustive), "gpt_oss"])
def test_ranks_train_what_was_loaded_before_them(tmp_path, family, state):
    model_of(family, "eager", torch.float32).save_pretrained(tmp_path / "start", max_shard_size="20KB")
    job = job_of(strategy={"optimizer_state": state})
    results, metrics = [], []
    for number, (num_ranks, on_meta) in enumerate([(1, False), (1, True), (2, True)]):
        path = tmp_path / str(number)
        metrics.append(run_ranks(num_ranks, train, job, tmp_path / "start", on_meta, path)[0])
        results.append(torch.load(path, weights_only=False)["state_dict"])
        # Whole, and under the names of the hub.
        again = transformers.AutoModelForCausalLM.from_pretrained(f"{path}-folder", dtype=torch.float64)
        of_module = {f"model.{name}": tensor for name, tensor in again.state_dict().items()}
        assert largest_error(of_module, results[0]) < 1e-9
    for weights, other in zip(results[1:], metrics[1:], strict=True):
        assert largest_error(weights, results[0]) < 1e-9
        assert other == pytest.approx(metrics[0])


def test_what_a_folder_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*config\.json: give the folder of a model"):
        meta_model(tmp_path)
    model_of("qwen3_moe", "eager", torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks model\.norm\.weight and 0 more of the 25 tensors of Qwen3MoeForCausalLM"
    ):
        meta_model(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors"):
        meta_model(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    """As those of gpt_oss on the hub are: the model knows none of their tensors."""
    model_of("gpt_oss", "eager", torch.float32).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "mxfp4"},', 1))
    with pytest.raises(ValueError, match=r"are quantised \(mxfp4, by quantization_config in its config\.json\)"):
        meta_model(tmp_path)


def test_a_folder_that_is_saved_again_is_read_again(tmp_path):
    model = model_of("qwen3_moe", "eager", torch.float32)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        weights = meta_model(tmp_path, dtype="auto").swiftmoe_weights
        for name, tensor in model.state_dict().items():
            assert torch.equal(weights.whole(name), tensor)
            tensor += 1


def test_a_configuration_of_another_model(tmp_path):
    model_of("qwen3_moe", "eager", torch.float32).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"moe_intermediate_size": 12', '"moe_intermediate_size": 10'))
    with pytest.raises(
        ValueError, match=r"experts\.\w+ in tensors of .* wants .*: its config\.json is of another model"
    ):
        meta_model(tmp_path)
