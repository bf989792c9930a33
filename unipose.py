"""Draw the attention mask of UniPose, count its parameters, or convert a checkpoint.

One LLM, three modalities: text, images and 3D human poses in one sequence (UniPose, CVPR 2025,
section 3). A pose is N code words of a VQ-VAE (tokenizer.py), which are words of the LLM's own
vocabulary. An image is P patches seen by two frozen encoders, CLIP for meaning and a pose ViT for
joints, joined channel by channel and projected to the width of the LLM. Text is causal, read and
written token by token. A pose that is asked for is N learnable queries that attend to each other in
both directions, so that one forward step predicts the whole pose:

    [INST] raise the left arm  <p> c c c c </p> [/INST]  <p> q q q q </p>  </s>
    |------------- prompt, no loss -----------------|     |  | | | |        |
                                                          |  | | | |        predicted by </p>
                                                          |  query i predicts code i itself
                                                          predicted by [/INST]

    vocabulary    text | pose 0..K-1 | <p> </p> | <img> </img> | N queries      ids by arithmetic
    mask          allowed = (j <= i)  or  (i and j are in the same pose block)

Letters: B batch, T sequence, J=22 joints, N pose tokens (80), K codes (2048), P image patches
(576), Dv channels of a patch (2304), D width of the LLM (4096).

Not here: training (train.py) and decoding with a KV cache (sample.py). The model reads images but
does not generate them. A pose has no hands, no face, no body shape and no place in the room.

    python unipose.py                      # the mask, and the parameters of weights/tiny
    python unipose.py --size paper         # parameters and memory of the paper's model
    python unipose.py --weights out/tiny --half weights/tiny  # copy as float16, LoRA merged
    python unipose.py --weights cache --merge out/llm         # the released LLM, for transformers
"""
import copy
import functools
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from tokenizer import (
    DESCRIPTION, TINY, TOKENIZER_ENTRIES, PoseTokenizer, TokenizerConfig, UserError, aa_to_matrix,
    as_user_error, atomic_write, check_entries, cli, delete_leftovers, file_errors, first_line,
    is_allowed, is_tensor, map_tensor, matrix_to_aa, matrix_to_sixd, read_checkpoint, read_header,
    read_json, read_torch_file, run_main, shorten, sixd_to_matrix,
)

# ---- 1. Sizes ------------------------------------------------------------------------------------
# A size of your own is one more entry. `llm`, `clip`, `pose_vit` and `tokenizer` are the arguments
# of LlamaConfig or MistralConfig, CLIPVisionConfig, VitPoseBackboneConfig and TokenizerConfig, of
# those that ENTRIES below knows.
SIZES = {
    "nano": {  # for the tests: all six stages train within seconds
        "llm": {
            "model_type": "llama",
            "hidden_size": 32,  # D
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,  # fewer than attention heads: grouped-query attention
            "intermediate_size": 64,  # width inside an MLP
            "max_position_embeddings": 1024,  # longest sequence
        },
        "clip": {
            "hidden_size": 32,  # channels of a patch
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 64,  # pixels, square
            "patch_size": 16,  # pixels, square: 4 x 4 patches, so P = 16
        },
        "pose_vit": {
            "hidden_size": 32,  # channels of a patch
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [64, 64],  # pixels, height and width; groups of people are wide
            "patch_size": [8, 8],  # 8 x 8 patches, resized to the grid of CLIP
        },
        "tokenizer": {
            "codes": 64,  # K
            "code_dim": 16,  # numbers in a code
            "hidden": 32,  # channels of the convolutions
            "upsample_step": 0,  # N = 20 * 2 ** upsample_step
            "reset_revived": True,  # see Quantizer._ema_update; not in the public code
        },
        "code_positions": True,  # see UniPose.embed
        "lora_r": 4,  # rank of the adapters
        "lora_alpha": 4,  # an adapter's output is scaled by lora_alpha / lora_r
    },
    "tiny": {  # ships as weights/tiny: some hours of training on two CPU cores
        "llm": {
            "model_type": "llama",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 384,
            "max_position_embeddings": 1024,
        },
        "clip": {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 192,
            "image_size": 128,
            "patch_size": 16,  # 8 x 8 patches, P = 64
        },
        "pose_vit": {
            "hidden_size": 128,  # wider than CLIP: the bottleneck of the image tasks
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": [128, 128],
            "patch_size": [16, 16],  # 8 x 8 patches
        },
        "tokenizer": {
            "codes": 512,
            "code_dim": 64,
            "hidden": 128,
            "upsample_step": 1,  # N = 40
            "reset_revived": True,  # after 600 steps 68 and 60 mm off, without it 71 and 78
        },
        "code_positions": True,
        "lora_r": 0,  # no LoRA, `instruct` trains the whole LLM: at this size LoRA saves no memory
        "lora_alpha": 32,  # for runs with --lora_r
    },
    "paper": {
        "llm": {  # LLaVA-1.6-Mistral-7B, which is Mistral-7B-Instruct-v0.2 inside
            "model_type": "mistral",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,  # every layer attends to the whole sequence
        },
        "clip": {  # CLIP-L/14-336, fine-tuned by LLaVA
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "image_size": 336,
            "patch_size": 14,  # 24 x 24 patches, P = 576
        },
        "pose_vit": {  # ViT-H of TokenHMR
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": [256, 192],  # upright, as one person is: it sees the middle columns
            "patch_size": [16, 16],  # 16 x 12 patches
        },
        "tokenizer": {  # the paper's VQ-VAE (section 3.1)
            "codes": 2048,
            "code_dim": 256,
            "hidden": 512,
            "upsample_step": 2,  # N = 80
        },
        "code_positions": False,  # not in the paper
        "lora_r": 64,  # this and alpha are the release's: LLaVA's defaults
        "lora_alpha": 16,
    },
}
# What a pose head without codes puts in the place of the entries of a size: at the paper's the LLM
# of ChatPose, LLaVA-1.5-13B, and its adapters. The embedded sizes stay: they compare the systems.
CHATPOSE = {
    "paper": {
        "llm": {
            "model_type": "llama",
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "intermediate_size": 13824,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
        },
        "lora_r": 8,
        "lora_alpha": 16,
    },
}
PAPER_TEXT = 32000  # text tokens of the Mistral vocabulary; smaller models count their own words
CHOICES = {  # ablations; the first choice is the default, the paper's (`projector`: the release's)
    "attn": ("mixed", "mixed_all", "mixed_image", "causal"),
    "vision": ("both", "clip", "pose"),
    "projector": ("mlp", "linear"),
    "pose_head": ("codes", "mlp", "text"),
    "lora_on": ("all", "qv"),
}
WITHOUT_CODES = CHOICES["pose_head"][1:]
# entries that older checkpoints lack, and what they mean without them
NEWER_ENTRIES = {"pose_head": "codes", "lora_on": "all"}


def model_config(size, projector="mlp", vision="", attn="mixed", pose_head="codes", lora_on=""):
    """The plain dict that describes a model, written to config.json: an entry of SIZES, `size`, and

    prompt_style  the wording of the prompts that the model was trained on, which sample.py uses:
                  "templates", ours, or "released", the official (both: assets/instructions.json)
    projector     "mlp" as released, "linear" as in the paper's formula
    vision        which encoders see an image: "both" (default), "clip" (of ChatPose) or "pose"
    attn          which poses and images are bidirectional, see `encode_segments`
    pose_head     how a pose is answered: "codes", N of them (UniPose), "mlp", the rotations that
                  an MLP makes of one hidden state (ChatPose), or "text", angles as words, see
                  `pose_words` (an ablation of ChatPose); only a model of codes reads poses, too
    lora_on       which projections of a layer LoRA adapts: "all" (default) or "qv", those of
                  queries and values (of ChatPose)
    lora          whether the layers of the LLM carry LoRA adapters
    """
    is_chatpose = pose_head != "codes"
    sizes = dict(SIZES[size])
    if is_chatpose:
        sizes |= CHATPOSE.get(size, {})
    return {
        "size": size,
        "prompt_style": "templates",
        "projector": projector,
        "vision": vision or ("clip" if is_chatpose else "both"),
        "attn": attn,
        "pose_head": pose_head,
        "lora_on": lora_on or ("qv" if is_chatpose else "all"),
        "lora": False,
        **sizes,
    }


MODEL_KEYS = tuple(model_config("nano"))  # what config.json must have; its other keys are notes

# what the entries of config.json may be (see `tokenizer.check_entries`); notes that are not listed
# are read by people only
WIDTH = range(1, 2 ** 17)
DEPTH = range(1, 1000)
ENTRIES = {
    "size": str,
    "prompt_style": ("templates", "released"),
    **CHOICES,
    "lora": bool,
    "llm": {
        "model_type": ("llama", "mistral"),
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": WIDTH,
        "num_key_value_heads": WIDTH,
        "head_dim": WIDTH,
        "intermediate_size": WIDTH,
        "max_position_embeddings": range(1, 2 ** 24),
        "hidden_act": str,
        "attention_bias": bool,
        "mlp_bias": bool,
        "rms_norm_eps": float,
        "rope_theta": float,
        "rope_parameters": dict,
        "sliding_window": (None,),  # `mixed_mask` has no window
    },
    "clip": {
        "model_type": ("clip_vision_model",),
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": WIDTH,
        "intermediate_size": WIDTH,
        "image_size": range(1, 4096),
        "patch_size": range(1, 4096),
        "hidden_act": str,
        "layer_norm_eps": float,
    },
    "pose_vit": {
        "model_type": ("vitpose_backbone",),
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": WIDTH,
        "image_size": [range(1, 4096)],
        "patch_size": [range(1, 4096)],
        "mlp_ratio": range(1, 64),
        "hidden_act": str,
        "qkv_bias": bool,
        "layer_norm_eps": float,
    },
    "tokenizer": TOKENIZER_ENTRIES,
    "code_positions": bool,
    "lora_r": range(2 ** 14),
    "lora_alpha": float,
    # notes
    "stages": [str],
    "seconds": dict,
    "commands": dict,
    "commits": dict,
    "retrieval": {"words": range(1, 2 ** 20), "d": range(1, 2 ** 14)},
}


def validate_config(config, where):
    """Checks a config before a model is built of it. Raises UserError.

    What the tokenizer lacks is as TokenizerConfig has it: older checkpoints know fewer entries.
    """
    missing = [key for key in MODEL_KEYS if key not in config]
    required = {part: SIZES["nano"][part] for part in ("llm", "clip", "pose_vit")}
    for part, keys in {**required, "retrieval": ENTRIES["retrieval"]}.items():
        if type(config.get(part)) is dict:  # if it is something else, ENTRIES refuses it below
            missing += [f"{part} {key}" for key in keys if key not in config[part]]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; it does not describe a UniPose model")
    entries = {key: config[key] for key in config if key in ENTRIES}
    check_entries(entries, ENTRIES, f"{where}:")

    problem = find_misfit(config)
    if problem:
        raise UserError(f"{where} does not describe a UniPose model: {problem}")


def find_misfit(config):
    """Which sizes of a config do not fit each other, in words; "" if they do.

    These do not show in the shapes of tensors, so a model would be built and fail or answer wrong.
    """
    for name in ("llm", "clip", "pose_vit"):
        part = config[name]
        if part["hidden_size"] % part["num_attention_heads"] and "head_dim" not in part:
            return f"hidden_size of {name} is no multiple of its num_attention_heads"

    llm = config["llm"]
    heads = llm["num_attention_heads"]
    if heads % llm["num_key_value_heads"]:
        return "num_attention_heads of llm is no multiple of its num_key_value_heads"
    if llm.get("head_dim", llm["hidden_size"] // heads) % 2:
        return "rotary embeddings need an even number of channels in each head of llm"
    for key, value in llm.get("rope_parameters", {}).items():
        if type(value) in (int, float) and not is_allowed(value, float):
            return f"{shorten(key)} in rope_parameters of llm is no positive number"

    clip = config["clip"]
    if clip["image_size"] < clip["patch_size"]:
        return "image_size of clip is smaller than its patch_size"

    vit = config["pose_vit"]
    if len(vit["image_size"]) != 2 or len(vit["patch_size"]) != 2:
        return "image_size and patch_size of pose_vit are a height and a width each"
    height, width = vit["image_size"]
    patch_height, patch_width = vit["patch_size"]
    if height % patch_height or width % patch_width:
        return "image_size of pose_vit is no multiple of its patch_size"
    if height < width or (height - width) % 2:  # it sees a square less equal columns on both sides
        return "image_size of pose_vit must be as high as wide, or higher by an even number"

    if config["lora"] and not config["lora_r"]:
        return "lora needs a lora_r above 0"
    if config["pose_head"] != "codes" and config["attn"] != "mixed":
        return f"attn {config['attn']} needs a pose_head of codes, not {config['pose_head']}"
    return ""


# ---- 2. One sequence -----------------------------------------------------------------------------
IGNORE_INDEX = -100  # the label of a position that predicts nothing
IMAGE_PLACEHOLDER = -1  # the id of a position that an image patch fills


@dataclass
class Vocab:
    """text | pose 0..K-1 | <p> </p> | <img> </img> | N queries: the order of the release."""
    n_text: int
    codes: int  # K
    n_tokens: int  # N

    def __post_init__(self):
        self.pose0 = self.n_text
        self.p_open = self.pose0 + self.codes
        self.p_close = self.p_open + 1
        self.img_open = self.p_open + 2
        self.img_close = self.p_open + 3
        self.query0 = self.p_open + 4
        self.size = self.query0 + self.n_tokens


class Row:
    """One sequence of T tokens, as lists: four of length T, and its images.

    ids         what position t reads: a token, or IMAGE_PLACEHOLDER
    labels      what position t predicts, or IGNORE_INDEX
    block       b where the token belongs to the b-th bidirectional pose or image, -1 where it is
                causal
    code_index  i where the token is the i-th code of a pose that is read, else -1
    images      features (P,Dv), which fill the placeholders in order
    poses       rotations (22,3,3) that the queries stand for, if the model has no codes
    """

    def __init__(self):
        self.ids = []
        self.labels = []
        self.block = []
        self.code_index = []
        self.images = []
        self.poses = []

    def new_block(self):
        """The number of the next bidirectional block."""
        return 1 + max(self.block, default=-1)

    def add(self, token, predicted=False, label=IGNORE_INDEX, block=-1, code_index=-1):
        """predicted: the position before predicts this token; label: what this token predicts."""
        if predicted:
            self.labels[-1] = token
        self.ids.append(token)
        self.labels.append(label)
        self.block.append(block)
        self.code_index.append(code_index)


def encode_segments(segments, vocab, text_ids, prompt_marks, bos, eos, n_patches, attn="mixed"):
    """Segments -> Row.

    segments: tuples (kind, value, is_target) of kind "text" (a string), "pose" (N codes, or if the
    model has none the rotations (22,3,3) of a target, which become one query), "image" (features
    (P,Dv)) or "ids" (text, tokenized already). Everything before the first target is the
    prompt, which stands between prompt_marks, the ids of `[INST]` and of `[/INST]`; the targets end
    with eos. A row without targets stops where the answer begins.

    attn: what is a bidirectional block. "mixed": target poses (the paper). "mixed_all": all poses.
    "mixed_image": target poses, and the patches of each image. "causal": nothing; a target pose is
    then its codes, one predicted after the other (the ablation of Table 7).
    """
    prompt = [segment for segment in segments if not segment[2]]
    target = [segment for segment in segments if segment[2]]
    assert segments == prompt + target, "targets come last"

    opening, closing = prompt_marks
    prompt = [("ids", opening, False), *prompt, ("ids", closing, False)]
    row = Row()
    row.add(bos)

    for kind, value, is_target in prompt + target:
        if kind in ("text", "ids"):
            ids = text_ids(value) if kind == "text" else value
            for token in ids:
                row.add(token, predicted=is_target)

        elif kind == "image":
            block = row.new_block() if attn == "mixed_image" else -1
            row.images.append(value)
            row.add(vocab.img_open)
            for _ in range(n_patches):
                row.add(IMAGE_PLACEHOLDER, block=block)
            row.add(vocab.img_close)

        else:
            is_query = is_target and attn != "causal"  # asked for in one step, by N queries
            block = row.new_block() if is_query or attn == "mixed_all" else -1
            row.add(vocab.p_open, predicted=is_target)
            value = torch.as_tensor(value)
            if value.is_floating_point():
                row.poses.append(value)
                row.add(vocab.query0, block=block)
                codes = []
            else:
                codes = value.tolist()
            for i, code in enumerate(codes):
                token = vocab.pose0 + code
                if is_query:
                    row.add(vocab.query0 + i, label=token, block=block)
                else:
                    row.add(token, predicted=is_target, block=block, code_index=i)
            row.add(vocab.p_close)  # never predicted: the length of a pose is known

    if target:
        row.add(eos, predicted=True)
    return row


def collate(rows, side="right"):
    """Rows -> a batch: ids, labels, block, code_index and valid (B,T), images (n,P,Dv) or None.

    valid is False where a row is padded; images are those of all rows, in order, and so are poses
    (n,22,3,3), None for a model of codes. labelled, patches and queries: where there is a label, an
    image patch or the query of one of `poses`, as indices into B*T; coded: which of `labelled` are
    queries that predict a code. They are found here, because a GPU that searches its own memory has
    to be waited for. side: where the padding goes, "right" to train, "left" to answer, so that all
    answers start in one column.
    """
    length = max(len(row.ids) for row in rows)

    def pad(values, fill):
        padding = [fill] * (length - len(values))
        return padding + values if side == "left" else values + padding

    images = []
    for row in rows:
        for features in row.images:
            images.append(torch.as_tensor(features).float())
    poses = [pose.cpu().float() for row in rows for pose in row.poses]

    ids = torch.tensor([pad(row.ids, 0) for row in rows])
    labels = torch.tensor([pad(row.labels, IGNORE_INDEX) for row in rows])
    block = torch.tensor([pad(row.block, -1) for row in rows])
    labelled = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)               # (n,)
    return {
        "ids": ids,
        "labels": labels,
        "labelled": labelled,
        "coded": (block.flatten()[labelled] >= 0).nonzero().squeeze(1),
        "patches": (ids.flatten() == IMAGE_PLACEHOLDER).nonzero().squeeze(1),
        "queries": (block.flatten() >= 0).nonzero().squeeze(1) if poses else None,
        "block": block,
        "code_index": torch.tensor([pad(row.code_index, -1) for row in rows]),
        "valid": torch.tensor([pad([True] * len(row.ids), False) for row in rows]),
        "images": torch.stack(images) if images else None,
        "poses": torch.stack(poses) if poses else None,
    }


WORD_MARKS = ("<unk>", "<s>", "</s>", "[inst]", "[/inst]")


def word_tokenizer(words):
    """A Hugging Face fast tokenizer whose tokens are the given words, for the nano and tiny LLMs.

    It drops case and spacing, which `tidy_text` restores. `[INST]` and `[/INST]` are words as well.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    words = [*WORD_MARKS, *words]
    table = {word: i for i, word in enumerate(dict.fromkeys(words))}  # each word once

    text = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    text.normalizer = normalizers.Lowercase()
    text.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split(".", "isolated"),
        pre_tokenizers.Split(",", "isolated"),
        pre_tokenizers.Split("?", "isolated"),
    ])
    return fast_tokenizer(text)


# unknown word, begin and end of a sequence
SPECIAL_TOKENS = (
    ("<unk>", "<s>", "</s>"),  # word_tokenizer, Mistral, Llama 1 and 2
    # Llama 3, whose byte-level tokenizer knows every word
    ("<|reserved_special_token_0|>", "<|begin_of_text|>", "<|end_of_text|>"),
)


def fast_tokenizer(text):
    """Wraps a `tokenizers.Tokenizer` as a Hugging Face one, with the special tokens that it has."""
    from transformers import PreTrainedTokenizerFast
    vocabulary = text.get_vocab()
    complete = [marks for marks in SPECIAL_TOKENS if set(marks) <= set(vocabulary)]
    unk, bos, eos = complete[0] if complete else SPECIAL_TOKENS[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=text, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=unk)


MARKS = [",", ".", "?"]     # those of a word-level model, the strongest last
TYPED_MARKS = str.maketrans({
    **dict.fromkeys("!;:。", "."),
    **dict.fromkeys("、،", ","),
    **dict.fromkeys("‘’‛`", "'"),
    **dict.fromkeys("‐‒–—―−", "-"),
})


def normalise_text(text, vocabulary=()):
    """Text as people type it -> words and the marks `. , ?`, in lower case, separated by spaces.

    Full-width letters become plain ones, sentence enders (`! ; :`) full stops; brackets, quotes and
    invisible characters go, and of several marks in a row the strongest stays. A word with a hyphen
    or an apostrophe stays whole if it is in `vocabulary`; else "half-bent" is "half bent", and
    "person's" is "person".
    """
    characters = []
    for character in unicodedata.normalize("NFKC", text).lower().translate(TYPED_MARKS):
        kind = unicodedata.category(character)
        if kind in ("Cc", "Cf") and not character.isspace():
            continue                    # such as a zero-width space
        if kind[0] in "PS" and character not in ".,?'-":
            character = " "             # any other mark or symbol
        characters.append(character)

    pieces = []
    for piece in re.findall(r"[^\s.,?]+|[.,?]", "".join(characters)):
        if piece not in MARKS:
            pieces += plain_words(piece, vocabulary)
        elif pieces and pieces[-1] in MARKS:
            pieces[-1] = max(pieces[-1], piece, key=MARKS.index)
        else:
            pieces.append(piece)
    return " ".join(pieces)


def plain_words(word, vocabulary):
    """A word with hyphens or apostrophes -> the words it stands for, [] if it is only marks."""
    word = word.strip("'-")
    if word in vocabulary:
        return [word]

    parts = []
    for part in word.split("-"):
        part = part.strip("'")
        if part not in vocabulary:
            part = part.removesuffix("'s")
        if part:
            parts.append(part)
    return parts


def tidy_text(text):
    """Spaces and capitals as in print: "the head . it" -> "The head. It"."""
    text = " ".join(text.split())
    for mark in (".", ",", "?"):
        text = text.replace(" " + mark, mark)
    sentences = text.split(". ")
    return ". ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences)


# ---- 3. The mask ---------------------------------------------------------------------------------
def mixed_mask(block, valid):
    """Which position attends to which: all before it, and all of its own block (paper eq. 6).

    block (B,T): -1 causal, b >= 0 the b-th block; valid (B,T) bool: False for padding, to which
    nothing attends. Returns (B,1,T,T) float32: 0 where allowed, the lowest number elsewhere. Float
    on purpose: eager attention of transformers adds the mask, a bool one as 0 and 1 without an
    error.
    """
    i = torch.arange(block.size(1), device=block.device)                             # (T,)
    causal = i[None, :] <= i[:, None]                                                # (T,T)
    one_block = (block[:, :, None] == block[:, None, :]) & (block[:, :, None] >= 0)  # (B,T,T)
    allowed = (causal | one_block) & valid[:, None, :]                               # (B,T,T)

    # padding attends to itself: on the left it has nothing else, and an empty softmax can be NaN
    allowed = allowed | torch.eye(len(i), dtype=torch.bool, device=i.device)         # (B,T,T)
    return float_mask(allowed)[:, None]                                              # (B,1,T,T)


def float_mask(allowed):
    """bool -> 0 where allowed, the lowest float32 elsewhere; any shape."""
    zeros = torch.zeros(allowed.shape, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(torch.float32).min)


def show_mask(block):
    """The mask of one sequence, a line of text per position, with █ where it attends."""
    block = torch.tensor([block])
    mask = mixed_mask(block, valid=torch.ones_like(block, dtype=torch.bool))
    lines = []
    for row in mask[0, 0].tolist():
        lines.append("".join("█" if value == 0 else "·" for value in row))
    return lines


# ---- 4. LoRA -------------------------------------------------------------------------------------
class LoRALinear(nn.Module):
    """y = W x + (alpha/r) B A x with W frozen (LoRA, eq. 3).

    B starts at zero, so step 0 is exactly the base model.
    """

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / r
        adapter = {"dtype": torch.float32, "device": base.weight.device}  # W may be bfloat16
        self.A = nn.Parameter(torch.empty(r, base.in_features, **adapter))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **adapter))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        # W and x may be bfloat16; a copy of A and B is smaller than one of x
        A = self.A.to(x.dtype)
        B = (self.scale * self.B).to(x.dtype)
        return self.base(x) + F.linear(F.linear(x, A), B)


def add_lora(model, r, alpha, on="all"):
    """Replaces every nn.Linear below `model` by a LoRALinear, in place, as `peft` does.

    UniPose adapts all seven projections of every LLM layer, as the official adapter does; on "qv":
    those of queries and values only, as in ChatPose and in the paper of LoRA.
    """
    for name, child in model.named_children():
        if not isinstance(child, nn.Linear):
            add_lora(child, r, alpha, on)
        elif on == "all" or name in ("q_proj", "v_proj"):
            setattr(model, name, LoRALinear(child, r, alpha))


def merge_lora(model):
    """Folds every LoRALinear back into an nn.Linear, W + (alpha/r) B A, in place."""
    for name, child in model.named_children():
        if isinstance(child, LoRALinear):
            with torch.no_grad():
                child.base.weight += child.scale * child.B @ child.A
            setattr(model, name, child.base)
        else:
            merge_lora(child)


# ---- 5. Two eyes ---------------------------------------------------------------------------------
# mean and spread of red, green and blue: CLIP's own, and ImageNet's for the pose ViT
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
POSE_MEAN = (0.485, 0.456, 0.406)
POSE_STD = (0.229, 0.224, 0.225)


def preprocess(image, size, mean, std, crop_offset):
    """PIL RGB image -> (3,size,size): resized by its shortest side, centre crop, normalised.

    crop_offset: margin -> pixels. The official branches round half a pixel differently: CLIP's down
    (math.floor), torchvision's to the even number (round).
    """
    shortest = min(image.size)
    width = int(size * image.width / shortest)
    height = int(size * image.height / shortest)
    image = image.resize((width, height), Image.Resampling.BICUBIC)

    left = crop_offset((width - size) / 2)
    top = crop_offset((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255        # (3,size,size)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


class DualVision(nn.Module):
    """CLIP for what an image shows, a pose ViT for where the joints are; both frozen (paper §3.2).

    forward: B RGB pictures, (H,W,3) uint8 arrays or PIL images -> (B,P,Dv), the features of both
    joined by channel. which: "both", or only "clip" or "pose".
    """

    def __init__(self, clip, pose_vit, which="both"):
        super().__init__()
        from transformers import (
            CLIPVisionConfig, CLIPVisionModel, VitPoseBackbone, VitPoseBackboneConfig,
        )
        self.which = which
        self.clip = CLIPVisionModel(CLIPVisionConfig(**clip))
        pose_config = VitPoseBackboneConfig(**{"layer_norm_eps": 1e-6} | pose_vit)
        self.pose_vit = VitPoseBackbone(pose_config)

        self.clip_size = clip["image_size"]  # pixels, square
        self.pose_size = pose_vit["image_size"]  # pixels, height and width
        self.grid = self.clip_size // clip["patch_size"]
        self.n_patches = self.grid ** 2  # P

        widths = {"clip": clip["hidden_size"], "pose": pose_vit["hidden_size"]}
        self.width = sum(widths.values()) if which == "both" else widths[which]  # Dv

    def clip_pixels(self, pictures):
        """Pictures -> (B,3,S,S) for CLIP."""
        pixels = []
        for image in as_pil(pictures):
            pixels.append(preprocess(image, self.clip_size, CLIP_MEAN, CLIP_STD, math.floor))
        return torch.stack(pixels)

    def pose_pixels(self, pictures):
        """Pictures -> (B,3,H,W) for the pose ViT: squares less their outer columns (256x192)."""
        height, width = self.pose_size
        pixels = []
        for image in as_pil(pictures):
            pixels.append(preprocess(image, height, POSE_MEAN, POSE_STD, round))
        margin = (height - width) // 2
        return torch.stack(pixels)[..., margin:height - margin]

    def pose_map(self, pixels):
        """(B,3,H,W) -> patch features (B,C,h,w) of the pose ViT after its last norm."""
        height, width = self.pose_size
        patch_height, patch_width = self.pose_vit.config.patch_size
        grid = (height // patch_height, width // patch_width)                        # h, w
        tokens = self.pose_vit(pixels).feature_maps[-1]                              # (B,h*w,C)
        return tokens.transpose(1, 2).unflatten(2, grid)                             # (B,C,h,w)

    def clip_features(self, pictures):
        """Pictures -> (B,P,C): the patches, without class token, before CLIP's last layer."""
        # to the device and the dtype of the weights
        pixels = self.clip_pixels(pictures).to(self.pose_vit.layernorm.weight)       # (B,3,S,S)
        states = self.clip(pixels, output_hidden_states=True).hidden_states[-2]      # (B,1+P,C)
        return states[:, 1:]                                                         # (B,P,C)

    def pose_features(self, pictures):
        """Pictures -> (B,P,C): the features of the pose ViT, resized to the grid of CLIP."""
        pixels = self.pose_pixels(pictures).to(self.pose_vit.layernorm.weight)       # (B,3,H,W)
        features = self.pose_map(pixels)                                             # (B,C,h,w)
        margin = (features.size(2) - features.size(3)) // 2
        features = F.pad(features, (margin, margin))                                 # (B,C,h,h)
        grid = (self.grid, self.grid)
        features = F.interpolate(features, grid, mode="bilinear", align_corners=True)
        return features.flatten(2).transpose(1, 2)                                   # (B,P,C)

    def forward(self, pictures):
        features = []
        if self.which != "pose":
            features.append(self.clip_features(pictures))
        if self.which != "clip":
            features.append(self.pose_features(pictures))
        return torch.cat(features, -1)                                               # (B,P,Dv)


def as_pil(pictures):
    """uint8 arrays or PIL images -> PIL RGB images."""
    images = []
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(np.asarray(picture))
        images.append(picture)
    return images


def make_projector(kind, width, llm_width):
    """Patch features -> LLM embeddings: "mlp" as released (mlp2x_gelu), "linear" as in paper."""
    if kind == "linear":
        return nn.Linear(width, llm_width)
    return nn.Sequential(nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))


STEP = 5  # degrees that the angles of a pose in words are rounded to
POSE_CHARACTERS = "0123456789-,"  # of a pose in words; each is a token
LONGEST_WORDS = len(",".join(["-180"] * 66))


def require_pose_characters(text_tokenizer):
    """Raises UserError if a pose in words would hold unknown ones."""
    vocabulary = text_tokenizer.get_vocab()
    missing = [character for character in POSE_CHARACTERS if character not in vocabulary]
    if missing:
        raise UserError(f"the text tokenizer lacks {' '.join(missing)}, in which --pose_head text "
                        "writes poses; train another --pose_head, or start from another --llm")


def pose_words(rotmat):
    """A pose (22,3,3) -> the three axis-angle components of each joint, in degrees: "0,-15,90,..."

    Whole degrees, rounded to STEP.
    """
    degrees = matrix_to_aa(rotmat.double()).rad2deg().flatten()                      # (66,)
    steps = (degrees / STEP).round().int()
    return ",".join(str(STEP * number) for number in steps.tolist())


def read_pose_words(text):
    """The reverse of `pose_words` -> (22,3,3), or None if these are not the words of a pose."""
    numbers = text.split(",")
    if len(numbers) != 66 or not all(re.fullmatch(r"-?[0-9]{1,3}", n) for n in numbers):
        return None
    degrees = torch.tensor([float(number) for number in numbers])                    # (66,)
    if degrees.abs().max() > 180:
        return None
    return aa_to_matrix(degrees.deg2rad().view(22, 3))                               # (22,3,3)


WORDS_PER_POSE = 100  # about as many as a batch of `instruct` has for each pose


def make_pose_mlp(llm_width):
    """The hidden state of a query -> 22 rotations in 6D: ChatPose's head, without its two hands.

    It starts near the pose at rest (not in ChatPose): from anywhere the L1 loss of a joint may get
    caught at half a turn, where every small step makes it larger. Its weights start at random: were
    they zero, the hidden states would learn one direction after another. On photographs the L1
    distance of the root is 0.15 after 300 steps, with zeros 0.22 (--size tiny, both eyes).
    """
    mlp = nn.Sequential(nn.Linear(llm_width, llm_width), nn.ReLU(), nn.Linear(llm_width, 22 * 6))
    rest = matrix_to_sixd(torch.eye(3).expand(22, 3, 3))                             # (22,6)
    with torch.no_grad():
        mlp[-1].bias.copy_(rest.flatten())
    return mlp


# ---- 6. UniPose ----------------------------------------------------------------------------------
class UniPose(nn.Module):
    """Pose tokenizer, two vision encoders, projector, and a Hugging Face Llama or Mistral.

    config: see `model_config`; text: a Hugging Face tokenizer, or None to count parameters only.
    """

    def __init__(self, config, text=None):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM
        validate_config(config, "the config")
        self.config = dict(config)
        self.stages = None  # which stages trained it, see `require_stages`; None: it is not known
        self.text_tokenizer = text
        self.is_word_level = True
        if text:  # only `word_tokenizer` has a word for this mark
            self.is_word_level = text.convert_tokens_to_ids("[inst]") != text.unk_token_id

        self.has_codes = config["pose_head"] == "codes"
        self.pose_tokenizer = None
        n_codes = 0
        n_queries = 1 if config["pose_head"] == "mlp" else 0
        if self.has_codes:
            self.pose_tokenizer = PoseTokenizer(TokenizerConfig(**config["tokenizer"]))
            n_codes = self.pose_tokenizer.config.codes
            n_queries = self.pose_tokenizer.n_tokens
        self.vision = DualVision(config["clip"], config["pose_vit"], config["vision"])

        n_text = len(text) if text else PAPER_TEXT
        self.vocab = Vocab(n_text, n_codes, n_queries)
        special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=False)
        llm = dict(vocab_size=self.vocab.size, **special, **config["llm"])
        self.llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**llm))

        llm_width = self.llm.config.hidden_size
        self.projector = make_projector(config["projector"], self.vision.width, llm_width)
        if config["pose_head"] == "text" and text:
            require_pose_characters(text)
        self.pose_mlp = None
        if config["pose_head"] == "mlp":
            self.pose_mlp = make_pose_mlp(llm_width)
        if config["lora"]:
            self.add_adapters()

    def add_adapters(self):
        """Gives the layers of the LLM the LoRA adapters that the config describes."""
        config = self.config
        add_lora(
            self.llm.model.layers, config["lora_r"], config["lora_alpha"], config["lora_on"])

    def grow_lora(self):
        """Freezes the layers of the LLM and gives them LoRA adapters, unless they have some."""
        if not self.config["lora"]:
            self.add_adapters()
            self.config["lora"] = True

    @property
    def device(self):
        return self.llm.lm_head.weight.device

    # -- from segments to a Row, and back to text --

    @torch.no_grad()
    def prepare_all(self, prompts):
        """Turns poses (22,3,3) into codes (N,) and pictures into features (P,Dv), all together.

        prompts: lists of segments without turns. Values that are prepared already (integer codes,
        features of rank 2) stay as they are, and so do the target poses of --pose_head mlp; those
        of text become words. Raises UserError if a model without codes is shown a pose.
        """
        poses = {}  # (index of the prompt, index of the segment): value
        pictures = {}
        for i, segments in enumerate(prompts):
            for k, (kind, value, is_target) in enumerate(segments):
                is_tensor = torch.is_tensor(value)
                if kind == "pose" and not self.has_codes:
                    if not is_target:
                        require_codes(self.config["pose_head"])
                elif kind == "pose" and is_tensor and value.is_floating_point():
                    poses[i, k] = value
                elif kind == "image" and not (is_tensor and value.dim() == 2):
                    pictures[i, k] = value

        ready = dict(zip(pictures, self.see(list(pictures.values()))))               # (P,Dv) each
        if poses:
            rotmat = torch.stack(list(poses.values())).to(self.device)               # (n,22,3,3)
            ready |= zip(poses, self.pose_tokenizer.encode(rotmat).tolist())         # N codes each

        prepared = [list(segments) for segments in prompts]
        if self.config["pose_head"] == "text":
            prepared = [[self.in_words(segment) for segment in row] for row in prepared]
        for (i, k), value in ready.items():
            kind, _, is_target = prepared[i][k]
            prepared[i][k] = (kind, value, is_target)
        return prepared

    def join_turns(self, segments):
        """Puts the earlier turns of a conversation in front of the last one, as one prompt.

        A segment ("turn", segments, False) is a turn with its answer, which is not learned again:

            [INST] kneel [/INST] <p> c c c </p> </s> [INST] now raise the left arm [/INST]
        """
        eos = self.text_tokenizer.eos_token_id
        opening, closing = self.prompt_marks
        joined = []
        for kind, value, is_target in segments:
            if kind != "turn":
                joined.append((kind, value, is_target))
                continue
            joined += [segment for segment in value if not segment[2]]
            joined.append(("ids", closing, False))
            joined += [self.as_history(segment) for segment in value if segment[2]]
            joined.append(("ids", [eos, *opening], False))
        return joined

    def as_history(self, segment):
        """An earlier answer as the next turn reads it.

        ChatPose reads no pose, but the position that it was read from stays in the conversation.
        """
        kind, value, _ = segment
        if kind == "pose" and self.config["pose_head"] == "mlp":
            vocab = self.vocab
            return "ids", [vocab.p_open, vocab.query0, vocab.p_close], False
        if self.config["pose_head"] == "text":
            kind, value, _ = self.in_words(segment)
        return kind, value, False

    def in_words(self, segment):
        """A segment of a model that writes poses as text: a target pose becomes ids."""
        kind, value, is_target = segment
        if kind != "pose":
            return segment
        ids = self.text_tokenizer.convert_tokens_to_ids(list(pose_words(value)))
        return "ids", [self.vocab.p_open, *ids, self.vocab.p_close], is_target

    @property
    def pose_length(self):
        """How many tokens stand between <p> and </p>, at most."""
        return LONGEST_WORDS if self.config["pose_head"] == "text" else self.vocab.n_tokens

    def see(self, pictures):
        """Pictures -> their features, (P,Dv) each; by 32, which bounds the memory it takes."""
        features = []
        for start in range(0, len(pictures), 32):
            features += self.vision(pictures[start:start + 32])
        return features

    def encode(self, segments):
        """Segments, prepared or not -> Row; see `encode_segments`."""
        return self.encode_all([segments])[0]

    def encode_all(self, prompts):
        """Lists of segments -> a list of Rows; poses and pictures go through the model together."""
        bos = self.text_tokenizer.bos_token_id
        eos = self.text_tokenizer.eos_token_id
        rows = []
        joined = [self.join_turns(segments) for segments in prompts]
        for segments in self.prepare_all(joined):
            prompt_marks = self.prompt_marks
            if not self.is_word_level:
                segments = self.tokenize_official(segments)
                prompt_marks = ([], [])  # they are in the text now
            rows.append(encode_segments(
                segments, self.vocab, self.text_ids, prompt_marks, bos, eos,
                self.vision.n_patches, self.config["attn"]))
        return rows

    @functools.cached_property
    def prompt_marks(self):
        """The ids of `[INST]` and the ids of `[/INST]`."""
        opening = self.text_tokenizer("[INST] ", add_special_tokens=False).input_ids
        closing = self.text_tokenizer(" [/INST]", add_special_tokens=False).input_ids
        return opening, closing

    @functools.cached_property
    def words(self):
        """The words of a word-level vocabulary, without its marks such as `[INST]`."""
        return {word for word in self.text_tokenizer.get_vocab() if word[0] not in "<["}

    @functools.cached_property
    def reserved_ids(self):
        """The ids that no text of a user may hold: begin, end and the marks of a prompt."""
        reserved = {self.text_tokenizer.bos_token_id, self.text_tokenizer.eos_token_id}
        for mark in self.prompt_marks:
            if len(mark) == 1:  # word pieces spell `[INST]` with several ordinary tokens
                reserved.add(mark[0])
        return reserved

    def text_ids(self, text):
        """Text -> ids. A `</s>` or `[/INST]` that a user typed becomes the unknown word."""
        if self.is_word_level:
            text = normalise_text(text, self.words)
        ids = self.text_tokenizer(text, add_special_tokens=False).input_ids
        reserved = self.reserved_ids
        return [self.text_tokenizer.unk_token_id if i in reserved else i for i in ids]

    def tokenize_official(self, segments):
        """Turns texts into ids as the official training does, for a model of word pieces.

        The row is `[INST] prompt [/INST] answer </s>`, with these spaces, and a full stop after a
        target pose. Consecutive texts are tokenized as one string, since a piece may span two of
        them; a string that follows a pose or an image starts anew, with a `▁` of its own.
        """
        prompt = [segment for segment in segments if not segment[2]]
        target = [segment for segment in segments if segment[2]]
        if target:
            full_stop = [("text", ".", True)] if target[-1][0] == "pose" else []
            target = [("text", " ", True), *target, *full_stop, ("text", " ", True)]

        # with `legacy` false the tokenizer makes `▁` of spaces but prepends none: type one more
        normalizer = str(self.text_tokenizer.backend_tokenizer.normalizer)
        prepends_none = "Replace" in normalizer and "Prepend" not in normalizer
        opening = " [INST] " if prepends_none else "[INST] "
        row = [("text", opening, False), *prompt, ("text", " [/INST]", False), *target]

        tokenized = []
        for kind, run in groupby(row, key=itemgetter(0)):
            if kind != "text":
                tokenized += run
                continue
            run = list(run)
            prompt_text = "".join(text for _, text, is_target in run if not is_target)
            target_text = "".join(text for _, text, is_target in run if is_target)
            ids = self.text_ids(prompt_text + target_text)
            n_prompt = len(self.text_ids(prompt_text))
            if n_prompt:
                tokenized.append(("ids", ids[:n_prompt], False))
            if n_prompt < len(ids):
                tokenized.append(("ids", ids[n_prompt:], True))
        return tokenized

    @property
    def answer_prefix(self):
        """The ids before a pose in an answer: of word pieces `▁`, the space after `[/INST]`."""
        if self.is_word_level:
            return []
        n_closing = len(self.text_ids(" [/INST]"))
        return self.text_ids(" [/INST] ")[n_closing:]

    @property
    def answer_suffix(self):
        """The ids between a pose and `</s>` in the training of a model of word pieces: ` . `."""
        return [] if self.is_word_level else self.text_ids(". ")

    def decode_text(self, ids):
        """Text ids -> text."""
        text = self.text_tokenizer.decode(ids)
        return tidy_text(text) if self.is_word_level else text.strip()

    # -- a question --

    def answer(self, text=None, image=None, pose=None, task="", ask="", decode="argmax"):
        """Answers one question -> sample.Answer, the same as on the command line of sample.py.

        text, image, pose: what is given, at most 1, 2, 2 of each; two are a list. image: a path, a
        PIL picture or an array (H,W,3) uint8. pose: a path, or rotations (22,3,3), y up. task: see
        data.TASKS; needed only where the inputs fit several. ask: one's own words, with <image>,
        <pose> or <caption> in the place of each input; then the model decides whether it answers
        with a pose or a text, unless a task says so. decode: see sample.Engine. Raises UserError.
        """
        # here, because sample.py imports this file
        from sample import answer_questions, check_typed, read_question
        question = read_question(text, image, pose, task, ask=ask)
        check_typed(self, question)
        [answer] = answer_questions(self, [question], decode)
        return answer

    # -- from a batch of rows to the loss --

    def embed(self, ids, code_index, images=None, places=None):
        """ids, code_index (B,T), images (n,P,Dv) or None -> (B,T,D).

        Projected image patches take the places of IMAGE_PLACEHOLDER, in order. places (n*P,): their
        indices into B*T where they are known, see `collate`.

        The meaning of a code depends on its index in the pose. Rotary positions are relative, and
        an LLM of four layers cannot recover the index from them, so with config["code_positions"]
        code i of an input pose also carries the embedding of query i, which costs no parameters
        (not in the paper, so off in its size).
        """
        embed_tokens = self.llm.model.embed_tokens
        x = embed_tokens(ids.clamp(min=0))                                           # (B,T,D)
        if self.config["code_positions"] and self.has_codes:
            queries = embed_tokens(self.vocab.query0 + code_index.clamp(min=0))      # (B,T,D)
            x = x + queries * (code_index >= 0)[..., None]

        if images is not None:
            if places is None:
                places = (ids.flatten() == IMAGE_PLACEHOLDER).nonzero().squeeze(1)   # (n*P,)
            images = images.to(next(self.projector.parameters()))
            patches = self.projector(images).flatten(0, 1).to(x.dtype)               # (n*P,D)
            x = x.flatten(0, 1).index_copy(0, places, patches).view_as(x)            # (B,T,D)
        return x

    def hidden(self, x, mask, positions, cache=None):
        """Embeddings (B,q,D), mask (B,1,q,past+q), positions (B,q) -> hidden states (B,q,D)."""
        x = x.to(self.llm.model.norm.weight.dtype)  # the layers may be bfloat16, see `cast_frozen`
        lowest = torch.finfo(x.dtype).min  # in half precision the lowest float32 would be -inf
        mask = mask.to(x.dtype).clamp(min=lowest)
        # the cache goes by its place: its name depends on the version of transformers
        output = self.llm.model(None, mask, positions, cache, x, use_cache=cache is not None)
        return output.last_hidden_state

    def read_poses(self, h):
        """Hidden states (n,D) of queries -> poses (n,22,3,3), of a model of --pose_head mlp."""
        sixd = self.pose_mlp(h.to(self.pose_mlp[0].weight.dtype)).float()            # (n,132)
        return sixd_to_matrix(sixd.unflatten(-1, (22, 6)))                           # (n,22,3,3)

    def rotation_loss(self, h, target):
        """Queries (n,D) against poses (n,22,3,3) -> (sum of the losses of n poses, logs).

        The loss of a pose is the mean L1 distance of the entries of its 21 body rotations, and that
        of its root, 0.1 each (ChatPose).
        """
        distance = (self.read_poses(h) - target).abs()                               # (n,22,3,3)
        root = distance[:, 0].mean((1, 2)).sum()
        body = distance[:, 1:].mean((1, 2, 3)).sum()
        n = root.new_tensor(len(target))
        logs = {"body_l1": (body.detach(), n), "root_l1": (root.detach(), n)}
        return 0.1 * body + 0.1 * root, logs

    def joint_loss(self, logits, codes, body):
        """Logits (n,N,K) under queries against the codes (n,N) -> (sum of n losses, logs).

        The loss of a pose is how far its joints are off on average, in metres, if it is decoded
        softly (see `PoseTokenizer.decode_soft`). Cross-entropy takes all wrong codes for equally
        wrong; through the decoder, which stays as it is, a near one costs little (TokenHMR).
        """
        pred = self.pose_tokenizer.decode_soft(logits.softmax(-1))                   # (n,22,3,3)
        target = self.pose_tokenizer.decode(codes)                                   # (n,22,3,3)
        distance = (body.joints(pred) - body.joints(target)).norm(dim=-1)            # (n,22)
        loss = distance.mean(1).sum()
        n = loss.new_tensor(len(codes))
        return loss, {"joints_mm": (1000 * loss.detach(), n)}

    def to_device(self, batch):
        """A batch of `collate` on the device of the model, without what is None."""
        return {name: value.to(self.device) for name, value in batch.items() if value is not None}

    def predict(self, batch):
        """A batch of `to_device` -> hidden states (B*T,D), logits (n,vocab) and labels (n,).

        Logits are wide and most positions have no label: lm_head runs on the n others only.
        """
        valid = batch["valid"]
        positions = (valid.cumsum(1) - 1).clamp(min=0)                               # (B,T)
        mask = mixed_mask(batch["block"], valid)                                     # (B,1,T,T)
        x = self.embed(
            batch["ids"], batch["code_index"], batch.get("images"), batch["patches"])
        h = self.hidden(x, mask, positions).flatten(0, 1)                            # (B*T,D)

        predicting = h[batch["labelled"]].to(self.llm.lm_head.weight.dtype)          # (n,D)
        logits = self.llm.lm_head(predicting).float()                                # (n,vocab)
        return h, logits, batch["labels"].flatten()[batch["labelled"]]

    def at_queries(self, batch, logits, labels):
        """Logits and labels of `predict` -> logits (P,N,K) and codes (P,N) of the P target poses.

        A model of --attn causal has no queries: P is 0.
        """
        vocab = self.vocab
        logits = logits[batch["coded"], vocab.pose0:vocab.p_open]                    # (P*N,K)
        codes = labels[batch["coded"]] - vocab.pose0                                 # (P*N,)
        poses = (-1, vocab.n_tokens)
        return logits.unflatten(0, poses), codes.unflatten(0, poses)

    def token_loss(self, logits, labels):
        """Logits (n,vocab), labels (n,) -> (mean cross-entropy, logs); see `forward`."""
        n_poses = (labels == self.vocab.p_open).sum()
        terms = len(labels) + n_poses
        loss = F.cross_entropy(logits, labels, reduction="sum") / terms

        is_right = logits.detach().argmax(-1) == labels                              # (n,)
        is_code = (labels >= self.vocab.pose0) & (labels < self.vocab.p_open)        # (n,)
        return loss, {
            "terms": terms,
            "pose_acc": ((is_right & is_code).sum(), is_code.sum()),
            "text_acc": ((is_right & ~is_code).sum(), (~is_code).sum()),
        }

    def forward(self, batch, body=None, joint_weight=0.0):
        """A batch of `collate` -> (loss, logs): the mean cross-entropy over labelled positions.

        As in the official loss, the `</p>` of a target pose counts in the mean although no position
        predicts it. logs: "terms", the number of terms of that mean; "pose_acc" and "text_acc", a
        pair each: how many codes or words are right, of how many.

        joint_weight: of `joint_loss` on the joints of `body`, 0 for none (the paper). With
        --pose_head mlp `rotation_loss` is added instead. ChatPose takes its mean over the poses of
        a batch, beside the mean over words. Both cannot be summed over the parts of a split batch,
        so a pose counts as WORDS_PER_POSE words instead: the same in a batch that has so many words
        for each pose.
        """
        batch = self.to_device(batch)
        h, logits, labels = self.predict(batch)
        loss, logs = self.token_loss(logits, labels)
        per_pose = WORDS_PER_POSE / logs["terms"]

        if joint_weight:
            joint_loss, joint_logs = self.joint_loss(
                *self.at_queries(batch, logits, labels), body)
            loss = loss + joint_weight * per_pose * joint_loss
            logs |= joint_logs
        if self.pose_mlp:  # the processes of torchrun add up the same logs, poses or not
            nothing = (loss.new_zeros(()), loss.new_zeros(()))
            logs |= {"body_l1": nothing, "root_l1": nothing}
        if "poses" in batch:
            pose_loss, pose_logs = self.rotation_loss(h[batch["queries"]], batch["poses"])
            loss = loss + per_pose * pose_loss
            logs |= pose_logs
        return loss, logs


# Which parameters each stage trains, as patterns of their names (paper §3.3); train.py has the rest
# of a stage. To train the whole LLM, LLM_PARAMETERS stand in the place of LORA_PARAMETERS.
LLM_PARAMETERS = r"llm\."
LORA_PARAMETERS = r"llm\.(model\.embed_tokens|lm_head)\.|llm\..*\.[AB]$"  # and embeddings, head
TRAINABLE = {
    "backbones": r"vision\.",
    "tokenizer": r"pose_tokenizer\.",
    "retrieval": r"retrieval\.",  # the retrieval model of eval.py
    "align": LORA_PARAMETERS + r"|pose_mlp\.",
    "project": r"projector\.",
    "instruct": LORA_PARAMETERS + r"|pose_mlp\.|projector\.",
    "reason": LORA_PARAMETERS + r"|pose_mlp\.|projector\.",
    "reward": LORA_PARAMETERS,
}


def adapts_llm(stage, size):
    """Does a stage train the LLM by LoRA, unless --lora_r is 0?"""
    # a small LLM starts from random weights: it needs all of them to learn to speak
    learns_to_speak = stage == "align" and size != "paper"
    return LORA_PARAMETERS in TRAINABLE[stage] and not learns_to_speak


def trainable(stage, size, lora_r=-1):
    """Pattern of the names of the parameters that a stage trains: TRAINABLE, at this size."""
    pattern = TRAINABLE[stage]
    if lora_r == 0 or not adapts_llm(stage, size):
        pattern = pattern.replace(LORA_PARAMETERS, LLM_PARAMETERS)
    return pattern


EXACT = TRAINABLE["tokenizer"]  # is float32 in any case: rounded weights would move its codes


def cast_frozen(model, dtype=torch.bfloat16):
    """Casts parameters in place: those that learn to float32, frozen ones to `dtype`.

    The pose tokenizer stays in float32. So do the buffers, of which only the frequencies of rotary
    embeddings are floating: in bfloat16 they would move the positions.
    """
    for name, parameter in model.named_parameters():
        is_exact = parameter.requires_grad or re.match(EXACT, name)
        parameter.data = parameter.data.to(torch.float32 if is_exact else dtype)


# ---- 7. Checkpoints ------------------------------------------------------------------------------
# A folder, see `tokenizer.DESCRIPTION`. The retrieval model of eval.py travels in the same file,
# under names that begin so:
RETRIEVAL_PREFIX = "retrieval."
CHECKPOINT_FILES = (  # what train.py writes to the folder, each by `atomic_write`
    "model.safetensors", "config.json", "tokenizer.json", "train_state.safetensors", "loss.png",
)
HISTORY_FILES = ("log.jsonl", "loss.png")  # what tells how training went


def git_hash():
    """The short hash of the commit that this code is at, or "none" outside a git repository.

    It ends in "-dirty" if files were changed since.
    """
    if not shutil.which("git"):
        return "none"
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = pathlib.Path(__file__).parent
    result = subprocess.run(command, cwd=here, text=True, capture_output=True)
    return result.stdout.strip() or "none"


def provenance():
    """What made a checkpoint, for its config.json: the command, the git hash, package versions."""
    import safetensors
    import transformers
    script = pathlib.Path(sys.argv[0]).name
    return {
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "git": git_hash(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": sys.version.split()[0],
    }


def to_half(state):
    """State dict -> float16, but for the codebook's running sums, which would overflow."""
    half = {}
    for name, tensor in state.items():
        is_running_sum = ".code_" in name
        half[name] = tensor.half() if tensor.is_floating_point() and not is_running_sum else tensor
    return half


def save(model, folder, half=False, extra=None, **notes):
    """Writes a checkpoint: model.safetensors, and copies of its config and text tokenizer to read.

    half: store float16. extra: more tensors by name (the retrieval model). notes: more entries of
    the config (stages, seed, ...). Raises UserError if the disk is full or `folder` is not a
    directory.
    """
    from safetensors.torch import save_file
    folder = pathlib.Path(folder)
    state = model.state_dict() | (extra or {})
    if half:
        state = to_half(state)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = {**model.config, "float16": half, **provenance(), **notes}
    text = json.loads(model.text_tokenizer.backend_tokenizer.to_str())

    delete_leftovers(folder, CHECKPOINT_FILES)
    with atomic_write(folder / "model.safetensors") as path:
        save_file(state, path, {DESCRIPTION: json.dumps({"config": config, "tokenizer": text})})
    for name, content in {"config.json": config, "tokenizer.json": text}.items():
        with atomic_write(folder / name) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")


def read_config(folder):
    """The config of a checkpoint as a dict, checked; of the official folder, which has none, made.

    The config in model.safetensors counts, not config.json (see `tokenizer.DESCRIPTION`). Raises
    UserError if the folder or one of its files is missing or unreadable.
    """
    if is_official(folder):
        return official_config(folder)
    config, _, _ = read_description(folder)
    return config


def read_description(folder):
    """Of a checkpoint its config, checked, its text tokenizer, and {name: shape} of its tensors.

    Raises UserError.
    """
    config, text, shapes = read_checkpoint(folder)
    config = NEWER_ENTRIES | config
    validate_config(config, f"the config of {folder}")
    return config, text, shapes


def read_tensors(path):
    """{name: tensor} of a safetensors file, floating numbers as float32.

    Raises UserError if the file is truncated or of another kind, or holds NaN or infinity.
    """
    from safetensors import safe_open
    _, shapes = read_header(path)
    state = {}
    with safe_open(str(path), "pt") as file:
        for name in shapes:
            tensor = file.get_tensor(name)
            require_finite(name, tensor, path)
            # a copy: the tensor itself is mapped from the file, which others may overwrite
            to = torch.float32 if tensor.is_floating_point() else tensor.dtype
            state[name] = tensor.to(to, copy=True)
    return state


def require_finite(name, tensor, where):
    """Raises UserError if a tensor of the file `where` holds NaN or infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = tensor.aminmax()  # NaN spreads to both; `isfinite` takes nine times as long
    if not (low.isfinite() and high.isfinite()):
        raise UserError(f"{shorten(name)} in {where} holds NaN or infinite numbers; get the file "
                        "again, or train it again with a lower --lr")


def default_dtype(size, device):
    """The type of weights that learn nothing: bfloat16 for the paper's size on a GPU, else float32.

    Small models gain nothing from bfloat16, and what one stage learned and the next one freezes
    would be rounded.
    """
    on_gpu = str(device).startswith("cuda")
    return torch.bfloat16 if on_gpu and size == "paper" else torch.float32


def load(folder, device="cpu", dtype=None, exact=EXACT):
    """A weights folder -> UniPose in eval mode.

    dtype: of the weights, None for `default_dtype`; exact: regex of the names of those that are
    float32 in any case. Raises UserError if a file is missing or damaged, or if names or shapes
    differ from what the config describes. Whether the model was trained for a question is up to
    `require_stages`. The tensors of the retrieval model are left to eval.py.
    """
    if is_official(folder):
        return load_official(folder, device, dtype or default_dtype("paper", device), exact)

    config, text, shapes = read_description(folder)
    dtype = dtype or default_dtype(config["size"], device)
    text = restore_text_tokenizer(text, folder)
    path = pathlib.Path(folder) / "model.safetensors"

    # on the meta device a config that does not fit the weights costs no memory, and time only for
    # its layers, of which there cannot be more than tensors
    for part in ("llm", "clip", "pose_vit"):
        if config[part]["num_hidden_layers"] > len(shapes):
            raise UserError(f"{path} does not fit its config: it holds fewer tensors than {part} "
                            "has layers")
    where = f"the config of {folder} does not describe a model ("
    with as_user_error(where, "); copy or train it again"), torch.device("meta"):
        model = UniPose({key: config[key] for key in MODEL_KEYS}, text)

    tensors = without_retrieval(map_tensors(path))
    model = assign_weights(model, tensors, path, device, dtype, exact, in_memory=True)
    model.stages = config.get("stages")
    return model


def without_retrieval(entries):
    """{name: anything} of a checkpoint less the retrieval model's."""
    return {name: value for name, value in entries.items()
            if not name.startswith(RETRIEVAL_PREFIX)}


# the parts that a byte pair encoding may have; the package `tokenizers` has others, and crashes on
# damaged ones
TEXT_PARTS = {
    "Sequence", "Prepend", "Replace", "NFC", "Lowercase", "Split", "WhitespaceSplit", "ByteLevel",
    "TemplateProcessing", "ByteFallback", "Fuse",
}


def restore_text_tokenizer(description, folder):
    """The text tokenizer of a checkpoint from the JSON object that describes it. Raises UserError.

    Of a word-level tokenizer only the words are read: the rest of it is in `word_tokenizer`.
    """
    from tokenizers import Tokenizer
    with as_user_error(f"the text tokenizer of {folder} is damaged (", "); copy or train it again"):
        vocabulary = description["model"]["vocab"]
        if description["model"]["type"] == "WordLevel":
            words = sorted(vocabulary, key=vocabulary.get)
            text = word_tokenizer(words[len(WORD_MARKS):])
        else:
            for kind in kinds_of_parts(description):
                if kind not in TEXT_PARTS:
                    raise UserError(f"the text tokenizer of {folder} has a part of the kind "
                                    f"{shorten(kind)}, which is not read")
            tokenizer = Tokenizer.from_str(json.dumps(description))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            vocabulary = tokenizer.get_vocab()
            text = fast_tokenizer(tokenizer)  # which adds the special tokens that are missing

        ids = list(range(len(text)))
        if text.get_vocab() != vocabulary or sorted(vocabulary.values()) != ids:
            raise UserError(f"the text tokenizer of {folder} lacks special tokens, or does not "
                            "number its tokens one by one; copy or train it again")
        text("[INST] some words, an unknown one: Ünïcødé. [/INST]")
    return text


def kinds_of_parts(description):
    """What a text tokenizer consists of besides its vocabulary: every "type" in its JSON object."""
    if description["model"]["type"] != "BPE":
        return [description["model"]["type"]]
    kinds = []
    pending = [description[key] for key in description if key not in ("model", "added_tokens")]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            pending += part.values()
            if "type" in part:
                kinds.append(part["type"])
    return kinds


def require_stages(stages, with_images, pose_head="codes", with_thought=False):
    """Raises UserError unless a model that has been through `stages` can answer.

    Questions of texts and poses need `align`, those with images `project` as well, and those that
    ask for thought `reason`; a stage that is trained again takes the later ones off the list.
    stages: None for a model whose history is not known, which is never refused. pose_head: of its
    config.
    """
    if stages is None:
        return
    needed = ["tokenizer", "align"] if pose_head == "codes" else ["align"]
    kind = "questions"
    if with_images:
        needed += ["backbones", "project"]
        kind = "questions with images"
    if with_thought:
        needed.append("reason")
        kind = "questions that ask for thought"
    missing = [stage for stage in needed if stage not in stages]
    if missing:
        raise UserError(
            f"the model cannot answer {kind}: it has not been through {', '.join(missing)}, or not "
            "again since an earlier stage was repeated; train it further with train.py")


def require_codes(pose_head):
    """Raises UserError if a model with this pose head cannot be shown a pose."""
    if pose_head != "codes":
        raise UserError(
            f"a model of --pose_head {pose_head} answers with poses, but it reads none; ask it "
            "with texts and pictures, or ask a model of --pose_head codes")


def set_threads(n, config):
    """Lets PyTorch use n threads of the CPU; n 0: one for a small model, all for a large one.

    The matrices of a small model are so small that handing them to threads takes longer than the
    sums, many times longer on a busy machine. config: see `model_config`.
    """
    if n == 0 and config["llm"]["hidden_size"] < 1024:
        n = 1
    if n:
        torch.set_num_threads(n)


def find_device(name=""):
    """A device by name; "": the GPU if there is one, else the CPU. Raises UserError if unusable."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.tolist()  # which the meta device has no numbers for
    except Exception:  # torch's own error lists all kinds of device in the world
        raise UserError(f"--device {name} cannot be used here; leave it out") from None
    return str(probe.device)


def shapes_of(model):
    """{name: shape} of all that a checkpoint stores of a model."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def load_strictly(model, state, where):
    """`load_state_dict` whose error is one sentence about the file `where` (UserError).

    The tensors of `state` become the model's own, so that it may be built on the meta device.
    """
    compare(shapes_of(model), {name: tensor.shape for name, tensor in state.items()}, where)
    model.load_state_dict(state, assign=True)


def compare(want, have, where):
    """Raises UserError, with the first three differences, unless both {name: shape} are equal."""
    differences = []
    for name in want:
        if name in have and have[name] != want[name]:
            differences.append(f"{name} is {tuple(have[name])}, expected {tuple(want[name])}")
    differences += [f"{name} is missing" for name in want if name not in have]
    differences += [f"{shorten(name)} is unknown" for name in have if name not in want]
    if differences:
        n_more = len(differences) - 3
        more = f" and {n_more} more differences" if n_more > 0 else ""
        raise UserError(f"{where} does not fit its config: {'; '.join(differences[:3])}{more}")


# ---- 8. Other people's weights: how their names map to ours --------------------------------------
# Folders of Llama, Mistral, LLaVA, CLIP and VitPose are read by transformers (`load_pretrained`).
# It does not know the release's own files nor those of HMR2 and TokenHMR: `rename_keys` maps their
# names by the tables below. Both give {our name: tensor}, which `assign_weights` puts into a model.
LLAVA = "llava-v1.6-mistral-7b"
CLIP = "clip-vit-large-patch14-336"
ORIGINS = {  # the parts of the official folder `cache`, and where each comes from
    LLAVA: "huggingface.co/liuhaotian/llava-v1.6-mistral-7b",
    "unipose": "huggingface.co/L-yiheng/UniPose",
    CLIP: "huggingface.co/openai/clip-vit-large-patch14-336",
    "pose_vqvae": "the Google Drive link of its README",
    "tokenhmr_model.ckpt": "TokenHMR's download page",
}

# How a name starts there -> here; the first match counts. None: UniPose has no use for it.
UNIPOSE_NAMES = {
    "base_model.model.model.mm_projector.": "projector.",
    "base_model.model.": "llm.",
}
VQVAE_NAMES = {
    "loss.": None,
    "": "pose_tokenizer.",
}
VIT_NAMES = {  # of HMR2 and TokenHMR
    "backbone.": "vision.pose_vit.",
    "": None,  # the heads, which predict a body
}
INNER_NAMES = {  # inside a name: there -> here
    ".pos_embed": ".embeddings.position_embeddings",
    ".patch_embed.proj.": ".embeddings.patch_embeddings.projection.",
    ".blocks.": ".encoder.layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.output.dense.",
    ".attn.qkv.": ".attention.attention.qkv.",
    ".last_norm.": ".layernorm.",
    ".lora_A.weight": ".A",
    ".lora_B.weight": ".B",
}
OFFICIAL_FILES = {  # path in `cache`: how its names map to ours
    "unipose/non_lora_trainables.bin": UNIPOSE_NAMES,
    "unipose/adapter_model.safetensors": UNIPOSE_NAMES,
    "pose_vqvae/best_MPJPE.ckpt": VQVAE_NAMES,
    "tokenhmr_model.ckpt": VIT_NAMES,
}

SETTINGS = (  # what our config.json keeps of a config of transformers
    "model_type", "hidden_size", "intermediate_size", "mlp_ratio", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "attention_bias",
    "mlp_bias", "qkv_bias", "rms_norm_eps", "layer_norm_eps", "max_position_embeddings",
    "rope_parameters", "sliding_window", "image_size", "patch_size",
)


def blame_description(folder):
    """`with blame_description(folder):` turns any exception into a UserError about its config."""
    return as_user_error(f"the JSON files in {folder} do not describe a model (",
                         "); copy it again")


def map_torch_file(path):
    """{name: tensor} of a state dict in a torch file, mapped. Raises FileError."""
    content = read_torch_file(path)
    with file_errors("it holds no tensors that have names, or damaged ones"):
        entries = content.get("state_dict", content)
        return {name: map_tensor(entry) for name, entry in entries.items() if is_tensor(entry)}


def map_tensors(path):
    """{name: tensor} of a safetensors or torch file, mapped into memory: read once it is used.

    Raises UserError.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.suffix == ".safetensors" else map_torch_file(path)
    except Exception as error:  # a damaged or hostile file can fail anywhere
        raise UserError(f"{path} is not a complete file of weights ({first_line(error)}); "
                        "get it again, from a source you trust") from None


def rename_keys(path, names):
    """{our name: tensor} of a file, by one of the tables above. Raises UserError."""
    renamed = {}
    for name, tensor in map_tensors(path).items():
        start = next((start for start in names if name.startswith(start)), None)
        if start is None:
            raise UserError(f"{path} holds {name}, which is no part of UniPose; "
                            "is it the file of another model?")
        if names[start] is None:
            continue

        ours = names[start] + name.removeprefix(start)
        for theirs, replacement in INNER_NAMES.items():
            ours = ours.replace(theirs, replacement)

        if ".qkv." in ours:  # one matrix there, three here
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):
                renamed[ours.replace("qkv", part)] = rows
        else:
            renamed[ours] = tensor
    return renamed


def infer_vit_settings(path):
    """config["pose_vit"] of an HMR2 or TokenHMR checkpoint, which describes nothing but tensors.

    None of them shows the number of heads: ViT-H has 16, smaller ViTs are assumed to have 16
    channels a head. Raises UserError.
    """
    tensors = rename_keys(path, VIT_NAMES)
    with as_user_error(f"{path} is not a checkpoint of HMR2 or TokenHMR (", ")"):
        width = tensors["vision.pose_vit.layernorm.weight"].numel()
    return SIZES["paper"]["pose_vit"] | {
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".layernorm_before.weight") for name in tensors),
        "num_attention_heads": min(16, width // 16),
    }


def infer_vqvae_config(path):
    """config["tokenizer"] of the official pose tokenizer. Raises UserError."""
    tensors = rename_keys(path, VQVAE_NAMES)
    with as_user_error(f"{path} is not a pose tokenizer of the release (", ")"):
        codes, code_dim = tensors["pose_tokenizer.quantizer.codebook"].shape
        hidden = tensors["pose_tokenizer.encoder.encoder.0.bias"].numel()
    return SIZES["paper"]["tokenizer"] | {
        "codes": codes, "code_dim": code_dim, "hidden": hidden, "z_up": True}


def read_backbone_config(folder, part, model_types):
    """The config of transformers that describes a folder, or one part of a composite model there.

    Raises UserError unless its model_type is among model_types.
    """
    from transformers import AutoConfig

    description = read_json(folder / "config.json")
    with blame_description(folder):
        settings = dict(description.get(part, description))
        model_type = settings.pop("model_type", model_types[0])
        model_type = model_type.removeprefix("llava_")  # LLaVA's authors rename Llama and Mistral
        if model_type in model_types:
            return AutoConfig.for_model(model_type, **settings)
    raise UserError(f"{folder} holds a model of type {model_type}, expected "
                    f"{' or '.join(model_types)}; see --llm, --clip and --pose_vit")


def read_llm_config(folder):
    """LlamaConfig or MistralConfig of a folder of Llama, Mistral or LLaVA. Raises UserError."""
    config = read_backbone_config(folder, "text_config", ["llama", "mistral"])
    config.sliding_window = None  # our sequences are shorter, and `mixed_mask` knows no window
    return config


def read_clip_config(folder):
    """CLIPVisionConfig of a folder of CLIP or of transformers' LLaVA. Raises UserError."""
    return read_backbone_config(folder, "vision_config", ["clip_vision_model"])


def pick_settings(config):
    """What our config.json keeps of a config of transformers."""
    settings = config.to_dict()
    return {name: settings[name] for name in SETTINGS if name in settings}


def read_bin_files(folder):
    """{name: tensor} of a folder with pytorch_model*.bin instead of safetensors, mapped; else None.

    transformers would give them to torch.load, see `tokenizer.read_torch_file`. Raises UserError.
    """
    paths = sorted(folder.glob("pytorch_model*.bin"))
    if not paths or any(folder.glob("model*.safetensors")):
        return None
    state = {}
    for path in paths:
        state |= map_tensors(path)
    return state


def load_pretrained(prefix, model_class, folder, config, names, unused, dtype):
    """{prefix + name: tensor} of a model that transformers reads from a local folder.

    names: {regex: replacement} for folders where it is a part of another model; unused: regex of
    what else is in these. Tensors stay mapped from their files where dtype is the files' own.
    Raises UserError, also for what transformers only warns of: tensors that are missing, unknown
    or of another shape.
    """
    from transformers.utils import logging
    logging.set_verbosity_error()  # its warnings become errors below

    state = read_bin_files(folder)
    source = folder if state is None else None  # it takes one or the other
    try:
        model, report = model_class.from_pretrained(
            source, state_dict=state, config=config, key_mapping=names,
            dtype=dtype, local_files_only=True, ignore_mismatched_sizes=True,
            output_loading_info=True)
    except Exception as error:  # a damaged or hostile file can fail anywhere
        origin = ORIGINS.get(folder.name, "its source")
        raise UserError(f"the weights in {folder} cannot be loaded ({first_line(error)}); "
                        f"get them again from {origin}") from None

    problems = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    for name in sorted(report["unexpected_keys"]):
        if not re.match(unused, name):
            problems.append(f"{name} is unknown")
    for name, shape, expected in report["mismatched_keys"]:
        problems.append(f"{name} is {tuple(shape)}, expected {tuple(expected)}")
    if problems:
        raise UserError(f"the weights in {folder} do not fit its config.json: {problems[0]} "
                        f"({len(problems)} such tensors)")
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def load_llm(folder, config, dtype):
    """The tensors of the LLM in a folder of Llama, Mistral or LLaVA, by our names."""
    from transformers import LlamaForCausalLM, MistralForCausalLM

    # AutoModelForCausalLM takes no state dict
    model_class = MistralForCausalLM if config.model_type == "mistral" else LlamaForCausalLM
    # older and newer LLaVA of transformers; LLaVA's authors call the LLM as Llama does
    names = {r"^language_model\.": "", r"^model\.language_model\.": "model."}
    unused = r"(model\.)?(vision_tower|mm_projector|multi_modal_projector|image_newline)"
    return load_pretrained("llm.", model_class, folder, config, names, unused, dtype)


def load_clip(folder, config, dtype):
    """The tensors of the vision tower in a folder of CLIP or LLaVA, by our names."""
    from transformers import CLIPVisionModel

    # LLaVA's authors nest it as vision_tower.vision_tower.vision_model
    names = {r"^(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?": ""}
    unused = (r"text_model|text_projection|visual_projection|logit_scale|"
              r"model\.|language_model|lm_head|multi_modal_projector|image_newline")
    return load_pretrained("vision.clip.", CLIPVisionModel, folder, config, names, unused, dtype)


def load_vitpose(folder, config, dtype):
    """The tensors of the backbone in a folder of VitPose, by our names."""
    from transformers import VitPoseBackbone

    names = {r"^backbone\.": ""}  # VitPoseForPoseEstimation
    return load_pretrained(
        "vision.pose_vit.", VitPoseBackbone, folder, config, names, r"head\.", dtype)


def assign_weights(
        model, tensors, where, device="cpu", dtype=torch.float32, exact=EXACT, in_memory=False):
    """Give `model`, built on the meta device, its weights {name: tensor}; returns it in eval mode.

    Tensors that are mapped from files are read here, one by one. dtype, exact: see `load`.
    in_memory: none stays mapped, because others may overwrite the files while the model is in use.
    Raises UserError where names or shapes do not fit, or a tensor holds NaN or infinity.
    """
    # between meta tensors this compares names and shapes and copies nothing
    load_strictly(model, {name: tensor.to("meta") for name, tensor in tensors.items()}, where)

    state = {}
    for name in tqdm(list(tensors), desc="weights", leave=False, delay=2):
        tensor = tensors.pop(name)  # a file that no tensor needs any more leaves memory
        require_finite(name, tensor, where)
        to = tensor.dtype
        if tensor.is_floating_point():
            to = torch.float32 if re.match(exact, name) else dtype
        state[name] = tensor.to(device, to, copy=in_memory)
    model.load_state_dict(state, assign=True)

    # constants that no file holds and that the meta device left empty
    rotary = type(model.llm.model.rotary_emb)
    model.llm.model.rotary_emb = rotary(model.llm.config)
    embeddings = model.vision.clip.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    return model.to(device).eval()


def load_text_tokenizer(folder):
    """The text tokenizer of a Hugging Face folder, from tokenizer.json or else tokenizer.model.

    A sentencepiece model is applied as by the official slow tokenizer: every string gets a `▁` in
    front, or with `legacy: false` only the first one (see `UniPose.tokenize_official`).
    AutoTokenizer would give other ids for some official prompts. Raises UserError.
    """
    from tokenizers import Tokenizer, decoders, normalizers

    path = folder / "tokenizer.json"
    with blame_description(folder):
        if path.exists():
            text = Tokenizer.from_str(path.read_text())
        else:
            text = read_sentencepiece(folder / "tokenizer.model")
    if text.token_to_id("▁") is None:
        return fast_tokenizer(text)

    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    normalizer = [normalizers.Replace(" ", "▁")]
    if settings.get("legacy") is not False:
        normalizer.insert(0, normalizers.Prepend("▁"))
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]

    # only the pieces: the ids of added tokens belong to our codes and queries
    text = Tokenizer(text.model)
    text.normalizer = normalizers.Sequence(normalizer)
    text.decoder = decoders.Sequence(decoder)
    return fast_tokenizer(text)


def read_sentencepiece(path):
    """tokenizer.model -> the same byte pair encoding as a `tokenizers.Tokenizer`.

    Any two pieces that together are a third may merge; the merge into the highest-scored piece
    comes first. Raises UserError where the package or the file is missing, or the two disagree.
    """
    from tokenizers import Tokenizer, models

    with as_user_error(f"{path} cannot be read (",
                       "); install sentencepiece, or put a tokenizer.json beside it"):
        import sentencepiece
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))

    ids = {}
    plain = []
    for i in range(len(pieces)):
        ids[pieces.id_to_piece(i)] = i
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i)):
            plain.append(i)

    ranked = [pieces.id_to_piece(i) for i in sorted(plain, key=pieces.get_score, reverse=True)]
    merges = []
    for piece in ranked:
        for cut in range(1, len(piece)):
            if piece[:cut] in ids and piece[cut:] in ids:
                merges.append((piece[:cut], piece[cut:]))
    text = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))

    # every piece once, and between them a letter and spaces that may be no pieces
    probe = "é  ".join(ranked).replace("▁", " ")
    if text.encode("▁" + probe.replace(" ", "▁")).ids != pieces.encode(probe):
        raise UserError(f"{path} is not a byte pair encoding like Llama's; "
                        "give a folder with tokenizer.json")
    return text


def is_official(folder):
    """Whether this is the folder `cache` of the official release, complete or not."""
    folder = pathlib.Path(folder)
    if (folder / "config.json").exists():
        return False
    return any((folder / name).exists() for name in ORIGINS)


def official_path(cache, name):
    """The path of a file in the official folder. Raises UserError, with its origin, if missing."""
    path = pathlib.Path(cache, name)
    if not path.exists():
        raise UserError(f"{path} is missing; get it from {ORIGINS[name.split('/')[0]]}")
    return path


def read_official_configs(cache):
    """The configs (of transformers) of the release's LLM and CLIP. Raises UserError."""
    llm = read_llm_config(official_path(cache, f"{LLAVA}/config.json").parent)
    clip = read_clip_config(official_path(cache, f"{CLIP}/config.json").parent)
    return llm, clip


def official_config(cache, **vit):
    """What config.json would say of the official release in `cache`. Raises UserError.

    vit: settings of the pose ViT that its file does not show (see `infer_vit_settings`).
    """
    adapter = read_json(official_path(cache, "unipose/adapter_config.json"))
    base = pathlib.Path(str(adapter.get("base_model_name_or_path"))).name
    if base != LLAVA or adapter.get("use_dora") or adapter.get("use_rslora"):
        raise UserError(f"the adapter in {pathlib.Path(cache, 'unipose')} is for {base}, not plain "
                        f"LoRA for {LLAVA}; get the folder from {ORIGINS['unipose']}")

    llm, clip = read_official_configs(cache)
    return model_config("paper") | {
        "prompt_style": "released",
        "llm": pick_settings(llm),
        "clip": pick_settings(clip),
        "pose_vit": infer_vit_settings(official_path(cache, "tokenhmr_model.ckpt")) | vit,
        "tokenizer": infer_vqvae_config(official_path(cache, "pose_vqvae/best_MPJPE.ckpt")),
        "lora": True,
        "lora_r": adapter.get("r"),
        "lora_alpha": adapter.get("lora_alpha"),
        "stages": ["backbones", "tokenizer", "align", "project", "instruct"],
        "seconds": {},
        "commands": {},
    }


def added_token_names(vocab):
    """The official names of the ids after the text, in order."""
    names = [f"<pose_id_{i}>" for i in range(vocab.codes + 2)]  # the last two are our <p> and </p>
    names += ["<im_start>", "<im_end>"]
    names += [f"<pose_query_{i}>" for i in range(vocab.n_tokens)]
    return names


def load_official(cache, device="cpu", dtype=torch.float32, exact=EXACT, merge=True, **vit):
    """The folder `cache` of the official release -> UniPose in eval mode. Raises UserError.

    dtype, exact: see `load`. merge: fold LoRA into the weights, or keep it to train on. vit: see
    `official_config`. Official codes stand for poses in AMASS's frame, z up; the pose tokenizer
    turns ours, y up, on their way in and out.
    """
    config = official_config(cache, **vit)
    text = load_text_tokenizer(official_path(cache, "unipose"))
    with blame_description(cache), torch.device("meta"):
        model = UniPose({key: config[key] for key in MODEL_KEYS}, text)

    # ours are counted, theirs are listed: a release in another order would decode to garbage
    path = official_path(cache, "unipose/added_tokens.json")
    ids = {name: i for i, name in enumerate(added_token_names(model.vocab), model.vocab.n_text)}
    if not ids.items() <= read_json(path).items():
        raise UserError(f"{path} does not list the tokens of poses and images in the order of "
                        f"UniPose's vocabulary; get it from {ORIGINS['unipose']}")

    # LLaVA fine-tuned its CLIP: the weights are LLaVA's, CLIP's own folder describes them
    llava = official_path(cache, LLAVA)
    llm_config, clip_config = read_official_configs(cache)
    tensors = load_llm(llava, llm_config, dtype) | load_clip(llava, clip_config, dtype)
    for name, names in OFFICIAL_FILES.items():
        # the embeddings and the head replace LLaVA's
        tensors |= rename_keys(official_path(cache, name), names)

    # the official file stores no EMA statistics: each code starts with a count of one
    codebook = tensors["pose_tokenizer.quantizer.codebook"]
    tensors["pose_tokenizer.quantizer.code_sum"] = codebook.clone()
    tensors["pose_tokenizer.quantizer.code_count"] = torch.ones(len(codebook))
    tensors["pose_tokenizer.quantizer.initialised"] = torch.tensor(True)

    for name in model.state_dict():  # a LoRALinear keeps W as `base`
        if ".base." in name:
            tensors[name] = tensors.pop(name.replace(".base.", "."))
    assign_weights(model, tensors, cache, device, dtype, exact)

    model.stages = config["stages"]
    if merge:
        merge_lora(model.llm.model.layers)
        model.config["lora"] = False
    return model


VOCABULARY_TABLES = ("llm.model.embed_tokens.weight", "llm.lm_head.weight")  # a row for each token


def extend_vocabulary(table, vocab):
    """A table with a row for each id of the LLM -> (vocab.size,D): new rows are the texts' mean."""
    text = table[:vocab.n_text]
    mean = text.mean(0, keepdim=True)
    return torch.cat([text, mean.expand(vocab.size - len(text), -1)])


def untrained_parts(model):
    """{name: tensor}: random weights for the parts of a meta model that no download brings."""
    config = model.config
    llm_width = model.llm.config.hidden_size
    parts = {}
    if model.has_codes:
        parts["pose_tokenizer."] = PoseTokenizer(TokenizerConfig(**config["tokenizer"]))
    if model.pose_mlp:
        parts["pose_mlp."] = make_pose_mlp(llm_width)
    parts["projector."] = make_projector(config["projector"], model.vision.width, llm_width)

    tensors = {}
    for prefix, part in parts.items():
        tensors |= {prefix + name: tensor for name, tensor in part.state_dict().items()}
    return tensors


def change_pose_head(model, settings, where, dtype=torch.float32, exact=EXACT):
    """A model with other `settings` (entries of its config, among them pose_head) whose eyes and
    LLM are those of `model`, which has learned nothing of poses.

    So two systems start from equal weights, as far as their vocabularies are alike. What only the
    new one has is untrained. where, dtype, exact: see `assign_weights`.
    """
    text = model.text_tokenizer
    if settings["pose_head"] == "text" and model.is_word_level:
        words = text.get_vocab()
        text = word_tokenizer([*sorted(words, key=words.get), *POSE_CHARACTERS])
    with torch.device("meta"):
        changed = UniPose(model.config | settings, text)

    tensors = untrained_parts(changed)
    shapes = shapes_of(changed)
    for name, tensor in model.state_dict().items():
        if name in VOCABULARY_TABLES:
            tensor = change_vocabulary(tensor, model.vocab, changed.vocab)
        if shapes.get(name) == tensor.shape:
            tensors[name] = tensor
    return assign_weights(changed, tensors, where, dtype=dtype, exact=exact)


def change_vocabulary(table, old, new):
    """A table (old.size,D) of the LLM for another pose head -> (new.size,D).

    Texts, marks and queries keep their rows; for others see `extend_vocabulary`.
    """
    changed = extend_vocabulary(table[:old.n_text], new)
    n_kept = 4 + min(old.n_tokens, new.n_tokens)
    changed[new.p_open:new.p_open + n_kept] = table[old.p_open:old.p_open + n_kept]
    return changed


def base_model(config, llm, clip, pose_vit, dtype=torch.float32):
    """The model of `config` with downloaded backbones; the rest is untrained (paper §3.3).

    llm: a folder of Llama, Mistral or LLaVA; clip: a folder of CLIP, or "" for LLaVA's own;
    pose_vit: a checkpoint of HMR2 or TokenHMR, or a folder of VitPose. Their sizes replace those of
    `config`. dtype: of the weights; the pose tokenizer is float32 in any case. Raises UserError.
    """
    from transformers import CLIPVisionConfig

    llm = pathlib.Path(llm)
    clip = pathlib.Path(clip or llm)
    pose_vit = pathlib.Path(pose_vit)

    llm_config = read_llm_config(llm)
    tensors = load_llm(llm, llm_config, dtype)
    if "mm_vision_tower" in read_json(clip / "config.json"):
        clip_config = CLIPVisionConfig(**config["clip"])  # LLaVA's authors save it undescribed
    else:
        clip_config = read_clip_config(clip)
    tensors |= load_clip(clip, clip_config, dtype)

    if pose_vit.is_dir():
        vit_config = read_backbone_config(pose_vit, "backbone_config", ["vitpose_backbone"])
        vit = pick_settings(vit_config)
        tensors |= load_vitpose(pose_vit, vit_config, dtype)
    else:
        vit = infer_vit_settings(pose_vit)
        tensors |= rename_keys(pose_vit, VIT_NAMES)

    where = f"{llm}, {clip} or {pose_vit}"
    sizes = {"llm": pick_settings(llm_config), "clip": pick_settings(clip_config), "pose_vit": vit}
    with blame_description(where), torch.device("meta"):
        model = UniPose(config | sizes, load_text_tokenizer(llm))

    for name in VOCABULARY_TABLES:
        tensors[name] = extend_vocabulary(tensors[name], model.vocab)
    tensors |= untrained_parts(model)
    return assign_weights(model, tensors, where, dtype=dtype)


def write_llm(model, folder):
    """The LLM alone, LoRA merged, as a folder for AutoModelForCausalLM and AutoTokenizer.

    Raises UserError.
    """
    from safetensors.torch import save_file

    folder = pathlib.Path(folder)
    merge_lora(model.llm.model.layers)
    state = {name: tensor.contiguous() for name, tensor in model.llm.state_dict().items()}
    text = copy.deepcopy(model.text_tokenizer)
    text.add_tokens(added_token_names(model.vocab))

    with atomic_write(folder / "model.safetensors") as path:
        save_file(state, path, {"format": "pt"})
    model.llm.config.architectures = [type(model.llm).__name__]
    model.llm.config.save_pretrained(folder)
    text.save_pretrained(folder)
    print(f"wrote the LLM to {folder}")


# ---- 9. Look at it -------------------------------------------------------------------------------
def parameter_table(model):
    """Rows (part, parameters, of them in LoRA) of the parts of a model; the last row is the sum.

    A ChatPose with one eye has a pose ViT which nobody asks; it is not counted.
    """
    parts = {}
    if model.has_codes:
        parts["pose tokenizer"] = model.pose_tokenizer
    if model.pose_mlp:
        parts["pose MLP"] = model.pose_mlp
    parts["CLIP"] = model.vision.clip
    if model.has_codes or model.vision.which != "clip":
        parts["pose ViT"] = model.vision.pose_vit
    parts |= {
        "projector": model.projector,
        "embeddings": model.llm.model.embed_tokens,
        "LLM layers": model.llm.model.layers,
        "LM head": model.llm.lm_head,
    }
    rows = []
    for part, module in parts.items():
        n = 0
        n_lora = 0
        for name, parameter in module.named_parameters():
            n += parameter.numel()
            if name.endswith((".A", ".B")):
                n_lora += parameter.numel()
        rows.append((part, n, n_lora))

    n_all = sum(n for _, n, _ in rows)
    n_all_lora = sum(n_lora for _, _, n_lora in rows)
    return [*rows, ("all", n_all, n_all_lora)]


def memory_table(model, tokens=1024):
    """Memory on a GPU: rows (stage, trained parameters, GB of the model, GB more per sequence).

    A frozen parameter takes the bytes of `default_dtype`, one of the pose tokenizer 4. A trained
    one takes 16: itself, its gradient and the two moments of AdamW, all float32. Adapters count
    from the first stage that trains them.

    A sequence of `tokens` tokens takes its keys and values in an answer; in training with
    --checkpointing its mask, the input of every layer, and what one layer holds at most while it
    is computed again: by measurement about 11 numbers for each channel, 6 for each inside the MLP.
    """
    config = model.config
    dtype = default_dtype(config["size"], "cuda")
    llm = model.llm.config
    head_dim = config["llm"].get("head_dim", llm.hidden_size // llm.num_attention_heads)
    keys_and_values = 2 * llm.num_hidden_layers * llm.num_key_value_heads * head_dim
    activations = (llm.num_hidden_layers + 11) * llm.hidden_size + 6 * llm.intermediate_size
    numbers = {
        "tokenizer": 0,  # it runs without the LLM
        "align": activations * tokens + tokens ** 2,
        "project": activations * tokens + tokens ** 2,
        "instruct": activations * tokens + tokens ** 2,
        "answer": keys_and_values * tokens,
    }
    if not model.has_codes:
        del numbers["tokenizer"]

    rows = []
    has_adapters = False
    for stage, n_numbers in numbers.items():
        pattern = r"$"  # an answer trains nothing
        if stage in TRAINABLE:
            pattern = trainable(stage, config["size"], config["lora_r"])
            has_adapters = has_adapters or adapts_llm(stage, config["size"])

        trained = 0
        n_bytes = 0
        for name, parameter in model.named_parameters():
            n = parameter.numel()
            if name.endswith((".A", ".B")) and not has_adapters:
                continue
            if re.match(pattern, name):
                trained += n
                n_bytes += 16 * n
            elif re.match(EXACT, name):
                n_bytes += 4 * n
            else:
                n_bytes += dtype.itemsize * n
        rows.append((stage, trained, n_bytes / 1e9, dtype.itemsize * n_numbers / 1e9))
    return rows


@dataclass
class Config:
    """Draw the mask, count the parameters of a model and its memory; or convert a checkpoint."""
    weights: str = TINY  # a trained folder: count its parameters, or convert it
    size: str = ""  # nano | tiny | paper: count this size instead, with 32,000 text tokens
    pose_head: str = "codes"  # of --size: codes (UniPose) | mlp (ChatPose) | text
    half: str = ""  # write the folder --weights here in float16, LoRA merged
    merge: str = ""  # write the LLM of --weights here as a plain Hugging Face folder, LoRA merged


def require_other(source, target, flag):
    """Raises UserError if a conversion would overwrite what it is made of."""
    if pathlib.Path(source).resolve() == pathlib.Path(target).resolve():
        raise UserError(f"{flag} {target} is the folder --weights itself; name another one")


def copy_half(source, target):
    """Copies a checkpoint, with all that travels with it, as float16 with LoRA merged.

    That is its retrieval model, its notes on how it was made, its log and its curve.

    Raises UserError.
    """
    require_other(source, target, "--half")
    config = read_config(source)
    model = load(source)
    merge_lora(model.llm.model.layers)
    model.config["lora"] = False

    retrieval = {}
    if "retrieval" in config:
        tensors = read_tensors(pathlib.Path(source) / "model.safetensors")
        names = [name for name in tensors if name.startswith(RETRIEVAL_PREFIX)]
        retrieval = {name: tensors[name] for name in names}
    notes = {key: value for key, value in config.items() if key not in {*model.config, "float16"}}
    save(model, target, half=True, extra=retrieval, **notes)
    copy_history(source, target)

    n_bytes = sum(file.stat().st_size for file in pathlib.Path(target).iterdir())
    print(f"wrote {target}: {n_bytes / 1e6:.1f} MB")


def copy_history(source, target):
    """Copies the log and the curve of a training, where there are some, beside a checkpoint."""
    for name in HISTORY_FILES:
        path = pathlib.Path(source, name)
        if path.exists():
            with atomic_write(pathlib.Path(target, name)) as copy_path:
                shutil.copyfile(path, copy_path)


def untrained(size, pose_head="codes"):
    """A model of one of SIZES without weights, which takes no memory. Raises UserError."""
    if size not in SIZES:
        raise UserError(f"--size {size} is not one of {', '.join(SIZES)}")
    if pose_head not in CHOICES["pose_head"]:
        raise UserError(
            f"--pose_head {pose_head} is not one of {', '.join(CHOICES['pose_head'])}")
    with torch.device("meta"):
        model = UniPose(model_config(size, pose_head=pose_head))
        if model.config["lora_r"]:
            model.grow_lora()
    return model


def draw_mask():
    """Prints the mask of a sequence with one target pose of four tokens."""
    names = ["a word", "a word", "<p>", "query", "query", "query", "query", "</p>", "a word"]
    block = [0 if name == "query" else -1 for name in names]
    print("█: the position of the row attends to the position of the column\n")
    for name, line in zip(names, show_mask(block)):
        print(f"{line}   {name}")


def print_parameters(model):
    """Prints the vocabulary of a model and the parameters of its parts."""
    v = model.vocab
    codes = f"pose {v.pose0}..{v.p_open - 1} | " if model.has_codes else ""
    print(f"\nvocabulary  text 0..{v.n_text - 1} | {codes}"
          f"<p> {v.p_open} </p> {v.p_close} | <img> {v.img_open} </img> {v.img_close} | "
          f"queries {v.query0}..{v.size - 1}\n")
    print(f"{'part':<16}{'parameters':>16}{'of them LoRA':>16}")
    for part, n, n_lora in parameter_table(model):
        print(f"{part:<16}{n:>16,}{n_lora:>16,}")


def print_memory(model):
    """Prints what an answer and each stage of training take in memory."""
    dtype = str(default_dtype(model.config["size"], "cuda")).removeprefix("torch.")
    print(f"\n{dtype:<16}{'trained':>16}{'GB':>16}{'a row of 1,024':>16}")
    for stage, trained, gigabytes, per_row in memory_table(model):
        print(f"{stage:<16}{trained:>16,}{gigabytes:>16.2f}{per_row:>16.2f}")


def main():
    """Converts a checkpoint, or draws the mask and counts."""
    config = cli(Config)
    if config.half:
        copy_half(config.weights, config.half)
    elif config.merge:
        require_other(config.weights, config.merge, "--merge")
        write_llm(load(config.weights), config.merge)
    else:
        model = untrained(config.size, config.pose_head) if config.size else load(config.weights)
        draw_mask()
        print_parameters(model)
        if config.size:
            print_memory(model)


if __name__ == "__main__":
    run_main(main)
