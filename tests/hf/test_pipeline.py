"""``swiftmoe train model=hf``: what is trained, on how many ranks, and what comes out."""

import csv
import json
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from hydra import compose, initialize_config_module
from torch.nn import functional as F

from lightning_swiftmoe.cli import train
from lightning_swiftmoe.cli.compose import prepare_hydra
from lightning_swiftmoe.cli.main import main
from lightning_swiftmoe.data import ChatData, JsonLinesSource
from lightning_swiftmoe.data.packing import Conversation, PackedConversations, best_fit
from lightning_swiftmoe.hf.causal_lm import build_model
from lightning_swiftmoe.hf.packing import why_no_packing
from lightning_swiftmoe.hf.tokenizer import FolderTokenizer
from lightning_swiftmoe.models.causal_lm import CausalLMModule
from lightning_swiftmoe.models.language_module import decay_groups, warmup_cosine
from tests.hf.families import FAMILIES, config_of, model_of
from tests.hf.folders import CHATML, conversation, save_folder, tokenizer_of, write_conversations
from tests.hf.test_sizes import QWEN3_30B_A3B
from tests.jobs import largest_error

HERE = [family for family in FAMILIES if config_of(family) is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("hub") / "qwen3", "qwen3_moe")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", 60)


# -- conversations as tokens -------------------------------------------------------------------------------------------

MARKED = CHATML.replace(
    "{{ message.content }}<|im_end|>",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}",
)
# As Qwen3's: thoughts stand in front of the last answer, and of no other.
THINKS = CHATML.replace(
    "\n{{ message.content }}",
    "\n{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
)
COUNTS = CHATML.replace("<|im_end|>", "{{ messages|length }}<|im_end|>")


def told(tokenizer, ids, answers):
    """What a model is trained to say, turn by turn."""
    edges = np.flatnonzero(np.diff(answers, prepend=False, append=False))
    return [tokenizer.decode(ids[first:last]) for first, last in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("template", "first", "end"),
    [(CHATML, "", "<|im_end|>\n"), (MARKED, "", "<|im_end|>"), (THINKS, "<think>\n\n</think>\n\n", "<|im_end|>\n")],
    ids=["chatml", "marked", "thinks"],
)
def test_answers_alone_are_trained(tmp_path, template, first, end):
    tokenizer = tokenizer_of(template)
    tokenizer.save_pretrained(tmp_path)
    messages = conversation(random.Random(1), turns=3)["messages"]
    messages.insert(0, {"role": "system", "content": "old cat"})
    ids, answers = FolderTokenizer(tmp_path).encode_conversation(messages)
    assert ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    said = [message["content"] + end for message in messages if message["role"] == "assistant"]
    assert told(tokenizer, ids, answers) == [*said[:-1], first + said[-1]]


def test_documents_end_with_the_end_of_sequence(folder):
    tokenizer = FolderTokenizer(folder)
    text = "one two\nthree"
    ids = tokenizer.encode_document(text.encode())
    assert ids.tolist() == [*tokenizer_of()(text, add_special_tokens=False)["input_ids"], tokenizer.eos]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"has no chat template: add a chat_template\.jinja"),
        (COUNTS, r"turn 2 otherwise once others follow.* mark answers in the template by \{% generation %\}"),
        ("{{ raise_exception('user and assistant take turns') }}", "refuses it: user and assistant take turns"),
    ],
    ids=["none", "counts", "refuses"],
)
def test_templates_that_do_not_work(tmp_path, template, message):
    tokenizer_of(template).save_pretrained(tmp_path)
    messages = conversation(random.Random(1), turns=2)["messages"]
    with pytest.raises(ValueError, match=message):
        FolderTokenizer(tmp_path).encode_conversation(messages)


# -- packing -----------------------------------------------------------------------------------------------------------


def naive_best_fit(lengths, room):
    bins = []
    for item in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        left = {number: room - sum(lengths[i] for i in held) for number, held in enumerate(bins)}
        fitting = [number for number in left if left[number] >= lengths[item]]
        if fitting:
            bins[min(fitting, key=lambda number: left[number])].append(item)
        else:
            bins.append([item])
    return bins


def test_best_fit():
    rng = random.Random(0)
    for _ in range(20):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 60))]
        bins, naive = best_fit(lengths, 30), naive_best_fit(lengths, 30)
        assert sorted(item for held in bins for item in held) == list(range(len(lengths)))
        rooms, others = (sorted(sum(lengths[item] for item in held) for held in found) for found in (bins, naive))
        assert rooms == others  # of equal room, another bin may be taken


def some_conversations(number=9, longest=11):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest, number)
    return [Conversation(rng.integers(3, 40, n).astype(np.int32), rng.random(n) < 0.5) for n in lengths]


def test_a_sequence_holds_whole_conversations():
    conversations = some_conversations()
    packed = PackedConversations(conversations, 16, pad=1)
    for index, numbers in enumerate(packed.sequences):
        row = packed[index]
        begin = 0
        for held in (conversations[number] for number in numbers):
            part = slice(begin, begin + len(held))
            assert row["input_ids"][part].tolist() == held.tokens.tolist()
            assert row["position_ids"][part].tolist() == list(range(len(held)))
            wanted = np.where(held.answers, held.tokens, -100)
            wanted[0] = -100
            assert row["labels"][part].tolist() == wanted.tolist()
            begin += len(held)
        assert row["input_ids"][begin:].tolist() == [1] * (16 - begin)
        assert set(row["labels"][begin:].tolist()) <= {-100}
        assert row["position_ids"][begin:].tolist() == list(range(16 - begin))


def difference_when_packed(model):
    """Between logits of conversations in one batch of sequences and of each alone."""
    packed = PackedConversations(some_conversations(), 16, pad=1)
    errors = []
    for index, numbers in enumerate(packed.sequences):
        row = packed[index]
        with torch.no_grad():
            ids, positions = row["input_ids"][None], row["position_ids"][None]
            together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
            begin = 0
            for held in (packed.conversations[number] for number in numbers):
                alone = model(input_ids=torch.tensor(held.tokens)[None].long(), use_cache=False).logits[0]
                errors.append(float((together[begin : begin + len(held)] - alone).abs().max()))
                begin += len(held)
    return max(errors)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [family for family in HERE if family != "nemotron_h"])
def test_packed_is_alone_or_refused(family, attention):
    # Softmax is fp32 in eager attention, and so is the router of DeepSeek.
    same = 1e-12 if attention == "sdpa" and family != "deepseek_v3" else 1e-5
    model = model_of(family, "eager", torch.float64).eval()
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("it has none")
    model.set_attn_implementation(attention)
    with torch.device("meta"):
        without_memory = transformers.AutoModelForCausalLM.from_config(config_of(family))
    reason = why_no_packing(without_memory)
    difference = difference_when_packed(model)
    assert (difference < same) == (reason is None), (difference, reason)
    assert (family in ("qwen3_5_moe", "gpt_oss")) == (reason is not None)


@pytest.mark.parametrize("name", ["NemotronHConfig", "MiniMaxConfig", "JambaConfig"])
def test_models_with_a_state_are_refused(name):
    """Of their default sizes, Mamba or linear attention among their layers; no weight is made."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)())
    assert "a state that runs along the sequence" in why_no_packing(model)


# -- batches -----------------------------------------------------------------------------------------------------------


class Ranks:
    def __init__(self, world_size, global_rank):
        self.world_size, self.global_rank = world_size, global_rank


def chat_data(folder, chats, world=1, rank=0, **options):
    data = ChatData(JsonLinesSource(str(chats)), str(folder), **{"seq_len": 48, "batch_size": 4, **options})
    data.trainer = Ranks(world, rank)
    return data


def test_batches_are_the_same_for_any_number_of_ranks_and_resumable(folder, chats):
    alone = list(chat_data(folder, chats).train_dataloader())
    halves = zip(*(chat_data(folder, chats, 2, rank).train_dataloader() for rank in range(2)), strict=True)
    for whole, parts in zip(alone, halves, strict=True):
        for name, tensor in whole.items():
            both = torch.cat([part[name] for part in parts])
            assert sorted(both.tolist()) == sorted(tensor.tolist()), name
    loader = chat_data(folder, chats).train_dataloader()
    loader.load_state_dict({"taken": 3})
    for batch, wanted in zip(loader, alone[3:], strict=True):
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_conversations_that_are_too_long_are_counted(folder, chats):
    lines = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    lengths = {len(FolderTokenizer(folder).encode_conversation(messages)[0]) for messages in lines}
    limit = sorted(lengths)[len(lengths) // 2]
    cut, dropped = (chat_data(folder, chats, seq_len=limit, overlong=how) for how in ("cut", "drop"))
    kept = {how: data.dataset("train").conversations for how, data in (("cut", cut), ("drop", dropped))}
    whole = chat_data(folder, chats, seq_len=max(lengths)).dataset("train").conversations
    short = [one for one in whole if len(one) <= limit]
    assert 0 < len(short) < len(whole)
    assert [one.tokens.tolist() for one in kept["drop"]] == [one.tokens.tolist() for one in short]
    begins = [one.tokens[:limit].tolist() for one in whole if len(one.cut(limit).trained())]
    assert [one.tokens.tolist() for one in kept["cut"]] == begins
    number = len(whole) - len(short)
    assert f"; {number} longer than {limit} cut" in cut.remarks()["conversations"]
    assert f"; {number} longer than {limit} left out" in dropped.remarks()["conversations"]


# -- training ----------------------------------------------------------------------------------------------------------

STEPS, RATE = 4, 0.1
COMMON = [
    *("model=hf", "optimizer=sgd", f"optimizer.lr={RATE}", "trainer.precision=64-true", f"trainer.max_steps={STEPS}"),
    *("trainer.enable_progress_bar=false", "report=false", "module.warmup_steps=2", "trainer.gradient_clip_val=0.5"),
]


def run(*overrides):
    assert train.main([*COMMON, *overrides]) == 0


def logged(run_folder, name):
    with (run_folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def cross_entropy(model, batch):
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def train_by_hand(folder, data):
    """Plain torch and transformers, on whole batches: losses and the model."""
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()
    optimizer = torch.optim.SGD(decay_groups(model), lr=RATE, momentum=0.9)
    losses = []
    for step, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = RATE * warmup_cosine(step, 2, STEPS, 0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("saved", [True, False])
def test_models_are_built_on_the_host_whatever_the_default(folder, saved):
    """Lightning makes a rank's device the default, on which transformers would ask for the accelerate package."""
    torch.manual_seed(1)
    plain = build_model(folder, saved=saved, on_meta=False).state_dict()
    torch.manual_seed(1)
    with torch.device("meta"):
        model = build_model(folder, saved=saved, on_meta=False)
    assert model.training
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


@pytest.mark.distributed
def test_ranks_train_what_plain_torch_does(tmp_path, folder, chats):
    """On conversations, of which ranks train different numbers of tokens, from a folder to a folder."""
    data = chat_data(folder, chats)
    numbers = [[(row[1:] != -100).sum() for row in batch["labels"]] for batch in data.train_dataloader()]
    assert any(len(set(map(int, rows))) > 1 for rows in numbers)
    losses, model = train_by_hand(folder, data)
    for devices in (1, 2):
        place = tmp_path / str(devices)
        run(
            *(f"model.path={folder}", "model.aux_loss_coef=0", "data=chat", f"data.source.paths={chats}"),
            *("data.seq_len=48", "data.batch_size=4", f"cluster.devices={devices}", f"hydra.run.dir={place}"),
            *("strategy.checkpoint=sharded", "trainer.val_check_interval=4", "trainer.limit_val_batches=1.0"),
        )
        assert logged(place, "train/loss") == pytest.approx(losses, rel=1e-9)
        again = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
        assert again.dtype == torch.float64
        assert largest_error(again.state_dict(), model.state_dict()) < 1e-9
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (place / "model" / name).read_bytes() == (folder / name).read_bytes()
        assert "swiftmoe" not in (place / "model" / "config.json").read_text()
        if devices == 1:  # several ranks see some sequences twice
            batch = {name: torch.stack([row[name] for row in data.dataset("val")]) for name in batch_names}
            with torch.no_grad():
                assert logged(place, "val/loss") == pytest.approx([cross_entropy(model, batch).item()], rel=1e-9)


batch_names = ("input_ids", "labels", "position_ids")


def test_text_in_a_virtual_cluster_with_the_auxiliary_loss(tmp_path, folder, capsys):
    """Whole models in memory, since no strategy makes their weights."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.Random(2).choices(["one two", "red cat\n", "old dog"], k=2000)))
    place = tmp_path / "run"
    run(
        *(f"model.path={folder}", "data=text", f"data.source.paths={text}", "data.seq_len=32", "data.batch_size=8"),
        *("cluster=virtual_16x1", "cluster.virtual_ranks=4", "cluster.accelerator=cpu", f"hydra.run.dir={place}"),
        *("module.save_pretrained=null", "model.checkpoint_activations=true"),
    )
    assert "auxiliary loss           on, times 0.001 (model.aux_loss_coef=0 turns it off)" in capsys.readouterr().out
    assert not (place / "model").exists()
    losses = logged(place, "train/loss")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


def test_the_auxiliary_loss_is_the_models(folder, chats):
    batch = next(iter(chat_data(folder, chats).val_dataloader()))
    module = CausalLMModule({"path": str(folder)})
    module.configure_model()
    module.trainer = Alone()
    with torch.no_grad():
        loss, logged = module.training_loss(batch)
        theirs = module.model(**batch, use_cache=False)
    assert loss == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert loss - logged == pytest.approx(0.001 * theirs.aux_loss.item(), rel=1e-3)
    assert theirs.aux_loss > 1


class Alone:
    """Of a Trainer, what a loss asks for."""

    world_size = 1

    class strategy:
        @staticmethod
        def reduce(tensor, reduce_op):
            return tensor


# -- recipes -----------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "olmoe_1b_7b": ("OlmoeConfig", {"intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}),
    "qwen3_30b_a3b": ("Qwen3MoeConfig", QWEN3_30B_A3B),
    "mixtral_8x7b": ("MixtralConfig", {}),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_fit_their_cluster(tmp_path, recipe, capsys):
    name, sizes = PUBLISHED[recipe]
    getattr(transformers, name)(**sizes).save_pretrained(tmp_path)
    prepare_hydra()
    with initialize_config_module("lightning_swiftmoe.conf", version_base="1.3"):
        config = compose("train", [f"recipes=hf/{recipe}", f"model.path={tmp_path}"])
    strategy, cluster, data = config.strategy, config.cluster, config.data
    num_ranks = cluster.num_nodes * cluster.devices
    assert data.batch_size % num_ranks == 0
    assert config.trainer.precision == "bf16-mixed"
    words = (
        *("plan", "cluster=h100_8x8", f"hf={tmp_path}", f"hf_recompute={config.model.checkpoint_activations}"),
        *(f"hf_seq_len={data.seq_len}", f"tokens_per_rank={data.batch_size // num_ranks * data.seq_len}"),
        *(f"num_ranks={strategy.expert_parallel_size or num_ranks}", f"slots_per_rank={strategy.slots_per_rank}"),
        *(f"offload={strategy.offload_optimizer}", "capacity_factor=null"),
    )
    assert main(list(words)) == 0
    assert "It fits." in capsys.readouterr().out


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path, folder):
    """Folders that lack something."""
    made = {name: tmp_path / name for name in ("no_config", "no_tokenizer", "no_shard", "quantised")}
    for place in made.values():
        shutil.copytree(folder, place)
    (made["no_config"] / "config.json").unlink()
    (made["no_tokenizer"] / "tokenizer.json").unlink()
    (made["no_tokenizer"] / "tokenizer_config.json").unlink()
    (made["no_shard"] / "model.safetensors.index.json").write_text('{"weight_map": {"a": "lost.safetensors"}}')
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (made["quantised"] / "config.json").write_text(json.dumps(config))
    small = config | {"vocab_size": 300}
    del small["quantization_config"]
    made["small"] = tmp_path / "small"
    made["small"].mkdir()
    (made["small"] / "config.json").write_text(json.dumps(small))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, made["small"])
    made["recurrent"] = tmp_path / "qwen3_5_moe"
    if config_of("qwen3_5_moe") is not None:
        save_folder(made["recurrent"], "qwen3_5_moe")
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    (tmp_path / "text.txt").write_text("one two three " * 500)
    return tmp_path


def test_a_mistake_is_one_line(broken, folder, chats, monkeypatch, capsys):
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.chdir(broken)
    good, text, chat = f"model.path={folder}", "data=text data.source.paths=text.txt", f"data.source.paths={chats}"
    mistakes = {
        "model.path=nowhere": "there is no nowhere/config.json: give the folder of a model",
        "model.path=no_config": "there is no no_config/config.json: give the folder of a model",
        "": "model.path: Missing mandatory value",
        "model.path=no_shard": "no_shard lacks lost.safetensors, of which model.safetensors.index.json says",
        "model.path=quantised": "are quantised (",
        f"model.path=no_tokenizer {text}": "no_tokenizer has no tokenizer: none of tokenizer.json, ",
        f"model.path=small model.weights=saved {text}": "small has neither model.safetensors.index.json nor",
        f"model.path=small {text}": f"has {len(tokenizer_of())} tokens, and the model knows 300",
        f"{good} {text} data.seq_len=65": "data.seq_len = 65 is more than the 64 that the model can read",
        f"{good} {text} data.batch_size=1000": "data.batch_size = 1000, but the training split has",
        f"{good} model.attention=fast": "fast",
        f"{good} model.weights=old": "weights must be one of auto, saved, random, got 'old'",
        f"{good} model.wieghts=saved": "there is no 'model.wieghts'; did you mean 'model.weights'?",
        f"{good} model.aux_loss_coef=-1": "aux_loss_coef must be None or a number, 0 or more, got -1",
        f"{good} {text} module.save_pretrained={folder}": "is where the model comes from: choose another",
        f"{good} data=chat": "data=chat needs data.source.paths=[FILE or FOLDER, ...] with JSON lines, got none",
        f"{good} data=chat {chat} data.overlong=split": "overlong must be one of cut, drop, got 'split'",
        f"{good} data=chat {chat} data.seq_len=2": "2 tokens with an answer: ",
        f"{good} data=chat data.source.paths=bad.jsonl": "bad.jsonl:1: message 1 has no text as its",
        f"model=tiny data=chat {chat} data.tokenizer={folder} model.vocab_size=330": "GPT reads windows of text",
        f"model=tiny data=chat {chat}": "data=chat needs a chat template: choose model=hf, or data.tokenizer=FOLDER",
    }
    if config_of("qwen3_5_moe") is not None:
        mistakes[f"model.path=qwen3_5_moe data=chat {chat}"] = "has layers with a state that runs along"
    for words, message in mistakes.items():
        status = train.main(["model=hf", "cluster.devices=1", "data.seq_len=32", "data.batch_size=4", *words.split()])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line, (words, line)
        assert status == 2
