"""Models with random weights, or their own in a folder: of open_clip and of transformers."""

from __future__ import annotations

import json
import logging
import shutil
from unittest.mock import Mock

import huggingface_hub
import open_clip
import pytest
import torch
import transformers
from huggingface_hub.utils import EntryNotFoundError
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import skipkernels as sk
from skipkernels.app.data import InputError
from skipkernels.app.train import evaluate_run, model, tune
from skipkernels.app.train.hugging_face_model import preprocess_settings
from skipkernels.app.untrusted import read_open_clip_config
from tests.app.runs import small
from tests.hugging_face_models import hugging_face_clip, metaclip_2, siglip_2

CPU = torch.device("cpu")
CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "squash"}


WEIGHTS = "open_clip_model.safetensors"


def config_file(tower: str = "text_cfg", **change: object) -> str:
    """Text of open_clip_config.json, with changed settings of a tower."""
    return json.dumps({"model_cfg": CONFIG | {tower: CONFIG[tower] | change}, "preprocess_cfg": PREPROCESS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model of open_clip in a folder."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "open_clip_config.json").write_text(config_file())
    torch.manual_seed(3)
    clip = CLIP(16, CLIPVisionCfg(**CONFIG["vision_cfg"]), CLIPTextCfg(**CONFIG["text_cfg"]), quick_gelu=True)
    save_file(clip.state_dict(), folder / WEIGHTS)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Serve the files of a folder as the repository org/name of the hub."""

    def serve(folder):
        def download(repository, filename=WEIGHTS, **_):
            assert repository == "org/name" and filename in ("open_clip_config.json", WEIGHTS)
            return str(folder / filename)

        monkeypatch.setattr(model, "hf_hub_download", download)
        monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", download)

    return serve


def test_load_model_random_weights_follow_seed():
    first, again, other = (
        model.load_model("pictogram-tiny", "random", CPU, seed=seed)[0].positional_embedding for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_local_dir(folder, tmp_path):
    loaded, transform, tokenizer = model.load_model(f"local-dir:{folder}", None, CPU)
    saved = load_file(folder / WEIGHTS)
    assert all(weight.equal(saved[name]) for name, weight in loaded.state_dict().items()) and not loaded.training
    assert isinstance(loaded.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    grey = transform(Image.new("RGB", (20, 9), (51, 51, 51)))
    expected = [(0.2 - mean) / std for mean, std in zip(PREPROCESS["mean"], PREPROCESS["std"], strict=True)]
    assert grey.shape == (3, 16, 16) and grey[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert tokenizer(["a cat"]).shape == (1, 16)
    without = shutil.copytree(folder, tmp_path / "without", ignore=shutil.ignore_patterns("*.safetensors"))
    empty, _, _ = model.load_model(f"local-dir:{without}", None, CPU, architecture_only=True)
    assert empty.visual.proj.shape == loaded.visual.proj.shape


def test_load_model_leaves_the_root_logger_as_it_is(monkeypatch):
    """With a handler, warnings that a console shows would be on stderr too."""
    monkeypatch.setattr(logging.root, "handlers", [])
    model.load_model("pictogram-tiny", None, CPU)
    assert not logging.root.handlers


def test_hub_model(folder, hub):
    hub(folder)
    loaded, _, tokenizer = model.load_model("hf-hub:org/name", None, CPU)
    assert loaded.visual.proj.equal(load_file(folder / WEIGHTS)["visual.proj"])
    assert tokenizer(["a"]).shape == (1, 16)


@pytest.mark.parametrize(
    ("tokenizer", "trust", "error"),
    [("other/name", False, "hf_tokenizer_name must not be remote"), ("other", False, "hf_tokenizer_name must not be"),
     ("other/name", True, "opened other/name"), ("org/name", False, "opened org/name"),
     ("bert-base-uncased", False, "opened bert-base-uncased")],
)  # fmt: skip
def test_tokenizer_of_another_repository(folder, hub, tmp_path, monkeypatch, tokenizer, trust, error):
    """The tokenizer of a model of open_clip itself is accepted."""
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "open_clip_config.json").write_text(config_file(hf_tokenizer_name=tokenizer))
    hub(copy)

    def opened(name, **options):
        raise OSError(f"opened {name}")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", opened)
    with pytest.raises(InputError, match=error):
        model.load_model("hf-hub:org/name", None, CPU, trust=trust)


def test_hub_model_that_cannot_be_read(monkeypatch):
    """Only of a repository without this file transformers may read the model."""
    monkeypatch.setattr(model, "hf_hub_download", Mock(side_effect=OSError("401: open_clip_config.json is gated")))
    with pytest.raises(InputError, match="hf-hub:org/name could not be loaded: 401"):
        model.load_model("hf-hub:org/name", None, CPU)


@pytest.mark.parametrize(
    ("tower", "change", "refused"),
    [("vision_cfg", {"timm_model_name": "hf-hub:org/name"}, "vision_cfg.timm_model_name"),
     ("vision_cfg", {"timm_model_kwargs": {"checkpoint_path": "w.pt"}}, "timm_model_kwargs.checkpoint_path"),
     ("vision_cfg", {"timm_model_kwargs": {"pretrained_cfg": {"hf_hub_id": "a"}}}, "pretrained_cfg.hf_hub_id"),
     ("text_cfg", {"hf_model_name": "org/name"}, "text_cfg.hf_model_name"),
     ("text_cfg", {"hf_model_name": "folder"}, "text_cfg.hf_model_name"),
     ("text_cfg", {"hf_tokenizer_name": "/home/me"}, "text_cfg.hf_tokenizer_name"),
     ("text_cfg", {"hf_tokenizer_name": "../me"}, "text_cfg.hf_tokenizer_name"),
     ("text_cfg", {"pool_type": "a/b"}, "text_cfg.pool_type"),
     ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "vocabulary"}}, "tokenizer_kwargs.bpe_path"),
     ("text_cfg", {"names": ["a", {"b": "c"}]}, "names.b")],
)  # fmt: skip
def test_read_open_clip_config_refuses(tmp_path, tower, change, refused):
    """The text may name code, a remote model, or a file elsewhere."""
    text = config_file(tower, **change)
    (tmp_path / "config").write_text(text)
    with pytest.raises(InputError, match=f"{refused} must not be remote or elsewhere.*add `trust=True`"):
        read_open_clip_config(tmp_path / "config")
    assert read_open_clip_config(tmp_path / "config", trust=True) == json.loads(text)["model_cfg"]


def test_read_open_clip_config_accepts_models_of_open_clip(tmp_path):
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if "vision_cfg" in config and "genlip_cfg" not in config:  # of open_clip 4: audio and captions
            (tmp_path / "config").write_text(json.dumps({"model_cfg": config}))
            assert read_open_clip_config(tmp_path / "config") == config, name


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [("local-dir:", None, "must name a model, as in local-dir:DIR"), ("hf-hub:", None, "must name a model"),
     ("local-dir:nowhere", None, "no folder .*nowhere"), ("local-dir:.", "openai", "has its own weights; leave it")],
)  # fmt: skip
def test_load_model_refuses(name, pretrained, message):
    with pytest.raises(InputError, match=message):
        model.load_model(name, pretrained, CPU)


OPEN_CLIP, HUGGING_FACE = "open_clip_config.json", "config.json"
# Files of a folder, and the message.
FOLDERS = [
    ({OPEN_CLIP: "["}, "not JSON"),
    ({OPEN_CLIP: "{}"}, "model_cfg must be a mapping"),
    ({OPEN_CLIP: '{"model_cfg": {"vision_cfg": 3, "text_cfg": {}}}'}, "model_cfg must be a mapping"),
    ({OPEN_CLIP: config_file()}, "Required pretrained weights"),
    ({}, "config.json'. The folder must have open_clip_config.json and its weights, or a model of transformers"),
    (
        {HUGGING_FACE: '{"model_type": "clip"}'},
        "model of transformers and its processor: save both with save_pretrained",
    ),
    (
        {HUGGING_FACE: '{"model_type": "bert"}'},
        "must be a CLIPModel, MetaClip2Model, SiglipModel, Siglip2Model; got 'bert'",
    ),
    (
        {HUGGING_FACE: '{"model_type": "clip"}', "adapter_config.json": "{}"},
        "has an adapter of PEFT; save the model after",
    ),
]


@pytest.mark.parametrize(("files", "message"), FOLDERS, ids=[message for _, message in FOLDERS])
def test_load_model_refuses_folder(files, message, tmp_path):
    """Without weights open_clip would continue with random ones. PEFT would read what an adapter names."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        model.load_model(f"local-dir:{tmp_path}", None, CPU)
    assert caught.value.argument == "model"


# ---- transformers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """CLIPModel with its processor in a folder."""
    folder = tmp_path_factory.mktemp("transformers")
    clip = hugging_face_clip(end=1).float()
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.1] * 3, image_std=[0.5] * 3
    )
    save(folder, clip, processor)
    return folder, clip, processor


def save(folder, clip, processor):
    """Save a model with its processor and a tokenizer of words; the end of text is 1."""
    clip.save_pretrained(folder)
    words = "<pad> <end> <start> a photo of character greek small capital letter the .".split()
    plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 1)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>").save_pretrained(folder)
    processor.save_pretrained(folder)


def test_transformers_folder(converted):
    folder, clip, processor = converted
    loaded, transform, tokenizer = model.load_model(f"local-dir:{folder}", None, CPU)
    assert all(weight.equal(clip.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert tokenizer(["a photo of a", "a"]).shape == (2, 77) and tokenizer(["a"])[0, :3].tolist() == [2, 3, 1]
    torch.manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 256, (24, 40, 3), dtype=torch.uint8).numpy())
    expected = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0])
    # Pillow's and torchvision's bicubic differ by a few levels of 255 on noise; another filter or crop by 0.5.
    assert (transform(picture) - expected).abs().mean() < 0.03


@pytest.mark.parametrize("make", [hugging_face_clip, metaclip_2, siglip_2])
def test_tune_models_of_transformers(make, converted, tmp_path):
    clip = make().float()
    clip.text_model.config.eos_token_id = 1
    naflex = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=9)
    save(tmp_path / "model", clip, naflex if make is siglip_2 else converted[2])
    if make is siglip_2:  # transformers reads the tokenizer of this type of model as its own class
        letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz."]
        vocabulary = {letter: index for index, letter in enumerate(letters)}
        transformers.Siglip2Tokenizer(vocab=vocabulary, padding_side="right").save_pretrained(tmp_path / "model")
    changes = {"data": "pictograms:food", "max_classes": 4, "shots": 1, "epochs": 1}
    metrics = tune(small(tmp_path / "run", model=f"local-dir:{tmp_path}/model", **changes))
    assert evaluate_run(tmp_path / "run", trust=True) == metrics["tuned"]
    sk.export(tmp_path / "run", "hugging-face", tmp_path / "exported", trust=True)
    exported = transformers.AutoModel.from_pretrained(tmp_path / "exported")
    assert type(exported) is type(clip)
    moved = [name for name, x in exported.state_dict().items() if not x.equal(clip.state_dict()[name])]
    assert any("layers.2" in name for name in moved) and not any("embeddings" in name for name in moved)
    settings = json.loads((tmp_path / "exported" / "preprocessor_config.json").read_text())
    assert settings.get("max_num_patches") == (9 if make is siglip_2 else None)


def test_transformers_folder_of_unknown_author(converted, tmp_path, monkeypatch):
    """Code, kernels and files that the configurations name are not used, on the disk and from the hub."""
    shutil.copytree(converted[0], tmp_path / "hostile")
    (tmp_path / "hostile" / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    shutil.move(tmp_path / "hostile" / "tokenizer.json", tmp_path / "elsewhere.json")
    (tmp_path / "hostile" / "tokenizer.json").write_text((tmp_path / "elsewhere.json").read_text())
    (tmp_path / "elsewhere.json").write_text("not read")
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
    added = {
        "auto_map": dict.fromkeys(names, "code.Code"),
        "attn_implementation": "org/name",
        "name_or_path": "/home/me",
        "tokenizer_file": str(tmp_path / "elsewhere.json"),
        "vocab_file": str(tmp_path / "elsewhere.json"),
    }
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        path = tmp_path / "hostile" / file
        values = json.loads(path.read_text()) | added
        for tower in ("text_config", "vision_config"):
            if tower in values:
                values[tower] |= {"attn_implementation": "org/name"}
        path.write_text(json.dumps(values))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hostile"))
    monkeypatch.setattr(model, "hf_hub_download", Mock(side_effect=EntryNotFoundError))
    for name in (f"local-dir:{tmp_path / 'hostile'}", "hf-hub:org/name"):
        loaded, _, tokenizer = model.load_model(name, None, CPU)
        assert all(weight.equal(converted[1].state_dict()[name]) for name, weight in loaded.state_dict().items())
        assert tokenizer(["a photo of a", "a"])[1, :3].tolist() == [2, 3, 1]
        towers = (loaded.config, loaded.config.text_config, loaded.config.vision_config)
        assert {tower._attn_implementation for tower in towers} == {"sdpa"}
    assert not (tmp_path / "executed").exists()


def test_preprocess_settings():
    squash = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    found = preprocess_settings(squash)
    assert found["size"] == (32, 32) and found["resize_mode"] == "squash"
    uneven = transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="which differ"):
        preprocess_settings(uneven)
