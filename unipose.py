"""One LLM, three modalities: text, images and 3D human poses in one sequence (UniPose, CVPR 2025, section 3).

A pose is N code words of a VQ-VAE (tokenizer.py) that live in the LLM's own vocabulary. An image is P patches seen by
two frozen eyes, CLIP for meaning and a pose ViT for joints, joined channel by channel and projected to the LLM's width.
Text is read and written causally. A pose that is *asked for* is N learnable queries that see each other in both
directions, so that the whole pose falls out of one forward step:

    [INST] raise the left arm  <p> c c c c </p> [/INST]  <p> q q q q </p>  </s>
    |------------- prompt, no loss -----------------|     |  | | | |        |
                                     predicted by the position before it    predicted by </p>
                                                             at its own position: query i says code i

    vocabulary    text | pose 0..K-1 | <p> </p> | <img> </img> | N queries          ids by arithmetic, never by strings
    who sees whom    allowed = (j <= i)  or  (i and j stand in the same pose block)

Letters: B batch, T sequence, J=22 joints, N pose tokens (80), K codes (2048), P image patches (576), D LLM width.

    python unipose.py                     # the mask of a small sequence, and the parameter table of weights/tiny
    python unipose.py --size paper        # the paper's dimensions: 7B Mistral, CLIP-L/14-336, ViT-H, without weights
    python unipose.py --weights out/tiny --half weights/tiny        # copy a trained folder in float16, LoRA merged
    python unipose.py --weights cache --merge out/llm               # the released LLM as a plain Hugging Face folder
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
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count, groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from tokenizer import (
    PoseTokenizer, Quantizer, TokenizerConfig, UserError, as_user_error, atomic_write, cli,
    first_line, load_asset, run_main,
)

# ---- 1. Sizes ----------------------------------------------------------------------------------------------------
# What transformers needs to know of the LLM, the two eyes and the tokenizer. `nano` exists for tests, `tiny` ships
# with the repository, `paper` is LLaVA-1.6-Mistral-7B + CLIP-L/14-336 + ViT-H (the release's LoRA: r 64, alpha 16).
# code_positions: see `UniPose.embed`; lora_r 0: `instruct` trains all weights, since a tiny LLM leaves nothing to be saved.
SIZES = load_asset("sizes")
TINY = str(pathlib.Path(__file__).parent / "weights" / "tiny")  # what ships, and what every script asks by default
CHOICES = {"attn": ("mixed", "mixed_all", "causal"), "vision": ("both", "clip", "pose"),
           "projector": ("mlp", "linear")}  # the first is the paper's, of the projector the release's
PAPER_TEXT = 32000  # text pieces of the Mistral vocabulary; embedded sizes count their own words


def model_config(size, projector="mlp", vision="both", attn="mixed"):
    """The plain dict that describes a model and is written to config.json. projector: "mlp" as released, "linear" as
    in the paper's formula; vision: "both" | "clip" | "pose"; attn: "mixed" | "mixed_all" | "causal" (see `encode`)."""
    return {"size": size, "prompt_style": "templates", "projector": projector, "vision": vision, "attn": attn, "lora": False, **SIZES[size]}


MODEL_KEYS = tuple(model_config("nano"))  # what config.json must hold of the model; the rest there are notes


# ---- 2. One sequence ---------------------------------------------------------------------------------------------
IGNORE_INDEX, IMAGE_PLACEHOLDER = -100, -1  # a position without a label; a position that an image patch will fill


def word_tokenizer(words):
    """A word-level text tokenizer (a Hugging Face fast tokenizer) for the embedded sizes, over the given word list.

    Case and spacing are normalised away; `tidy` puts them back. Marks of the prompt are words like any other.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    special = ["<unk>", "<s>", "</s>", "[inst]", "[/inst]"]
    table = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    text = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    text.normalizer = normalizers.Lowercase()
    text.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), *(pre_tokenizers.Split(mark, "isolated") for mark in ".,?")])
    return fast_tokenizer(text)


# unknown word, begin, end: of the embedded models, Mistral and Llama 1 and 2; of Llama 3, which knows every word
SPECIAL_TOKENS = (("<unk>", "<s>", "</s>"), ("<|reserved_special_token_0|>", "<|begin_of_text|>", "<|end_of_text|>"))


def fast_tokenizer(text):
    """A `tokenizers.Tokenizer` as a Hugging Face one with three marks."""
    from transformers import PreTrainedTokenizerFast
    unk, bos, eos = next((marks for marks in SPECIAL_TOKENS if None not in map(text.token_to_id, marks)), SPECIAL_TOKENS[0])
    return PreTrainedTokenizerFast(tokenizer_object=text, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=unk)


def tidy_text(text):
    """Spaces and capitals as in print: "the head . it" -> "The head. It"."""
    sentences = " ".join(text.split()).replace(" .", ".").replace(" ,", ",").replace(" ?", "?").split(". ")
    return ". ".join(s[:1].upper() + s[1:] for s in sentences)


@dataclass
class Vocab:
    """text | pose 0..K-1 | <p> </p> | <img> </img> | N queries: the order of the official release."""
    n_text: int
    codes: int  # K
    n_tokens: int  # N

    def __post_init__(self):
        self.pose0, end = self.n_text, self.n_text + self.codes
        self.p_open, self.p_close, self.img_open, self.img_close, self.query0 = range(end, end + 5)
        self.size = self.query0 + self.n_tokens


class Sequence(NamedTuple):
    """One row, aligned: ids (T,), labels (T,) = what position t must say or NONE, block (T,) = -1 for a causal token
    or b for the b-th bidirectional pose, code_index (T,) = which of its pose's N a code is or -1, images: list of features
    (P,Dv) that fill the IMAGE positions in order."""
    ids: list
    labels: list
    block: list
    code_index: list
    images: list


def encode(segments, vocab, text_ids, prompt_marks, bos, eos, n_patches, attn="mixed"):
    """Segments -> ids, labels, block and code_index together, so that nothing is derived a second time.

    segments: (kind, value, is_target) with text: str, pose: N codes (ints), image: features (P,Dv). Everything before
    the first target is the prompt, wrapped in `[INST]` and `[/INST]` (prompt_marks: the ids of both); targets end with eos.
    Without targets the row stops where the answer begins. Which poses become blocks: "mixed" target poses (the
    official rule), "mixed_all" input poses too, "causal" none; a target pose is then its own codes, one after the other
    (the ablation of Table 7).
    """
    # id, label of the position before, own label, block, code_index
    rows, images, blocks = [(bos, IGNORE_INDEX, IGNORE_INDEX, -1, -1)], [], count()
    prompt = [s for s in segments if not s[2]]
    target = [s for s in segments if s[2]]
    assert segments == prompt + target, "targets come last"
    for kind, value, said in [("ids", prompt_marks[0], False), *prompt, ("ids", prompt_marks[1], False), *target]:
        if kind in ("text", "ids"):
            rows += [(i, i if said else IGNORE_INDEX, IGNORE_INDEX, -1, -1) for i in (text_ids(value) if kind == "text" else value)]
        elif kind == "image":
            images.append(value)
            rows += [(i, IGNORE_INDEX, IGNORE_INDEX, -1, -1) for i in (vocab.img_open, *[IMAGE_PLACEHOLDER] * n_patches, vocab.img_close)]
        else:
            codes = [vocab.pose0 + int(code) for code in value]
            queried = said and attn != "causal"
            b = next(blocks) if queried or attn == "mixed_all" else -1
            rows.append((vocab.p_open, vocab.p_open if said else IGNORE_INDEX, IGNORE_INDEX, -1, -1))
            if queried:  # query i says code i at its own position
                rows += [(vocab.query0 + i, IGNORE_INDEX, code, b, -1) for i, code in enumerate(codes)]
            else:
                rows += [(code, code if said else IGNORE_INDEX, IGNORE_INDEX, b, i) for i, code in enumerate(codes)]
            rows.append((vocab.p_close, IGNORE_INDEX, IGNORE_INDEX, -1, -1))  # given, never predicted: the length of a pose is known
    if target:
        rows.append((eos, eos, IGNORE_INDEX, -1, -1))
    ids, before, own, block, code_index = map(list, zip(*rows))
    labels = [o if o != IGNORE_INDEX else b for o, b in zip(own, before[1:] + [IGNORE_INDEX])]
    return Sequence(ids, labels, block, code_index, images)


def collate(sequences, side="right"):
    """Rows of unequal length -> ids, labels, block, code_index, valid (B,T) and images (n,P,Dv) in row order, or None.

    side: "right" for training, "left" for answering, so that every row's answer starts in the same column."""
    longest = max(len(s.ids) for s in sequences)

    def pad(row, fill):
        gap = [fill] * (longest - len(row))
        return gap + list(row) if side == "left" else list(row) + gap

    images = [torch.as_tensor(f).float() for s in sequences for f in s.images]
    batch = {key: torch.tensor([pad(getattr(s, key), fill) for s in sequences])
             for key, fill in dict(ids=0, labels=IGNORE_INDEX, block=-1, code_index=-1).items()}          # (B,T) each
    return {**batch, "valid": torch.tensor([pad([True] * len(s.ids), False) for s in sequences]),
            "images": torch.stack(images) if images else None}


# ---- 3. The mask -------------------------------------------------------------------------------------------------
def mixed_mask(block, valid):
    """Who may look at whom: everything before, and inside one pose both ways; nobody reads padding (paper eq. 6).

    block (B,T): -1 causal, b >= 0 the b-th pose; valid (B,T) bool. Returns (B,1,T,T) float, 0 or the lowest number.
    Float on purpose: eager attention of transformers adds the mask, and adds a bool one as 0 and 1 without an error.
    """
    i = torch.arange(block.size(1), device=block.device)
    same = (block[:, :, None] == block[:, None, :]) & (block[:, :, None] >= 0)           # (B,T,T)
    allowed = ((i[None, :] <= i[:, None]) | same) & valid[:, None, :]                    # (B,T,T)
    allowed = allowed | torch.eye(len(i), dtype=torch.bool, device=i.device)             # padding reads itself: no NaN
    return float_mask(allowed)[:, None]                                                  # (B,1,T,T)


def float_mask(allowed):
    """bool -> 0 where allowed, the lowest float32 elsewhere; any shape."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, torch.finfo(torch.float32).min)


def show_mask(block, valid=None):
    """The mask of one row as text, █ for "row may look at column". block: list of ints."""
    block = torch.tensor([block])
    mask = mixed_mask(block, torch.ones_like(block, dtype=torch.bool) if valid is None else torch.tensor([valid]))
    return "\n".join("".join("█" if open_ else "·" for open_ in row) for row in (mask[0, 0] == 0).tolist())


# ---- 4. LoRA -----------------------------------------------------------------------------------------------------
# which parameters learn in each stage, by name (paper §3.3); see `train.STAGES`
LLM_PARAMETERS = r"llm\."
LORA_PARAMETERS = r"llm\.(model\.embed_tokens|lm_head)\.|llm\..*\.[AB]$"  # embeddings, head and LoRA
TRAINABLE = {
    "backbones": r"vision\.",
    "tokenizer": r"pose_tokenizer\.",
    "retrieval": r"retrieval\.",
    "align": LORA_PARAMETERS,
    "project": r"projector\.",
    "instruct": LORA_PARAMETERS + r"|projector\.",
}


class LoRALinear(nn.Module):
    """y = W x + (alpha/r) B A x with W frozen (LoRA, eq. 3). B starts at zero, so step 0 is exactly the base model."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / r
        self.A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def add_lora(model, r, alpha):
    """Put a LoRALinear in the place of every nn.Linear below `model`, in place; what `peft` does here in a dozen lines.
    UniPose adapts all seven projections of every LLM layer, as the official adapter does."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, name, LoRALinear(child, r, alpha))
        else:
            add_lora(child, r, alpha)


def merge_lora(model):
    """Fold every LoRALinear back into a plain nn.Linear, W + (alpha/r) B A, in place: the same function."""
    for name, child in model.named_children():
        if isinstance(child, LoRALinear):
            with torch.no_grad():
                child.base.weight += child.scale * child.B @ child.A
            setattr(model, name, child.base)
        else:
            merge_lora(child)


# ---- 5. Two eyes -------------------------------------------------------------------------------------------------
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
POSE_MEAN, POSE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(image, size, mean, std, crop_offset):
    """PIL RGB image -> (3,size,size) float: shortest side to `size` by bicubic, centre crop, normalised, as released.

    crop_offset: margin -> pixels, because the official branches round odd margins differently (CLIP floors, torchvision
    rounds half to even)."""
    scale = size / min(image.size)
    if scale != 1:
        wide, high = (size if side == min(image.size) else int(size * side / min(image.size)) for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (crop_offset((side - size) / 2) for side in image.size)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255            # (3,size,size)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


class DualVision(nn.Module):
    """CLIP says what the picture shows, the pose ViT where the joints are; both frozen, joined by channel (paper §3.2).

    forward: list of B RGB pictures, (H,W,3) uint8 arrays or PIL images -> (B,P,Dv), Dv = CLIP width + ViT width.
    """

    def __init__(self, clip, pose_vit, which="both"):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel, VitPoseBackbone, VitPoseBackboneConfig
        self.which = which
        self.clip = CLIPVisionModel(CLIPVisionConfig(**clip))
        self.pose_vit = VitPoseBackbone(VitPoseBackboneConfig(**{"layer_norm_eps": 1e-6} | pose_vit))
        self.clip_size, self.grid = clip["image_size"], clip["image_size"] // clip["patch_size"]
        self.pose_size, self.n_patches = pose_vit["image_size"], self.grid**2
        self.width = (which != "pose") * clip["hidden_size"] + (which != "clip") * pose_vit["hidden_size"]

    def clip_pixels(self, pictures):
        """Pictures -> (B,3,S,S) for CLIP."""
        return torch.stack([preprocess(p, self.clip_size, CLIP_MEAN, CLIP_STD, math.floor) for p in as_pil(pictures)])

    def pose_pixels(self, pictures):
        """Pictures -> (B,3,H,W) for the pose ViT: a square whose outer columns are then cut off (256 -> 256x192)."""
        high, wide = self.pose_size
        margin = (high - wide) // 2
        square = [preprocess(p, high, POSE_MEAN, POSE_STD, round) for p in as_pil(pictures)]
        return torch.stack(square)[..., margin:high - margin]

    def pose_map(self, pixels):
        """(B,3,H,W) -> patch features (B,C,h,w) of the pose ViT after its last norm."""
        h, w = (side // patch for side, patch in zip(self.pose_size, self.pose_vit.config.patch_size))
        tokens = self.pose_vit(pixels).feature_maps[-1]                                  # (B,h*w,C)
        return tokens.transpose(1, 2).unflatten(2, (h, w))                               # (B,C,h,w)

    def forward(self, pictures):
        like, parts = self.pose_vit.layernorm.weight, []                                 # device and dtype
        if self.which != "pose":
            states = self.clip(self.clip_pixels(pictures).to(like), output_hidden_states=True).hidden_states
            parts.append(states[-2][:, 1:])                                              # (B,P,Dc), class token off
        if self.which != "clip":
            seen = self.pose_map(self.pose_pixels(pictures).to(like))                    # (B,Dp,h,w)
            margin = (seen.size(2) - seen.size(3)) // 2
            seen = F.pad(seen, (margin, margin))                                         # (B,Dp,h,h) square again
            seen = F.interpolate(seen, (self.grid, self.grid), mode="bilinear", align_corners=True)  # CLIP's grid
            parts.append(seen.flatten(2).transpose(1, 2))                                # (B,P,Dp)
        return torch.cat(parts, -1)                                                      # (B,P,Dv)


def as_pil(pictures):
    """uint8 arrays or PIL images -> PIL RGB images."""
    return [p if isinstance(p, Image.Image) else Image.fromarray(np.asarray(p)) for p in pictures]


def make_projector(kind, width, llm_width):
    """Patch features -> LLM embeddings: "mlp" as in the release (mlp2x_gelu), "linear" as in the paper's formula."""
    if kind == "linear":
        return nn.Linear(width, llm_width)
    return nn.Sequential(nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))


# ---- 6. UniPose --------------------------------------------------------------------------------------------------
class UniPose(nn.Module):
    """The whole model: pose tokenizer, two eyes, projector, and a Hugging Face Llama or Mistral.

    config: see `model_config`; text: a Hugging Face tokenizer, or None to look at sizes only (PAPER_TEXT pieces).
    """

    def __init__(self, config, text=None):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM
        self.config, self.text_tokenizer = dict(config), text
        self.is_word_level = text is None or text.convert_tokens_to_ids("[inst]") != text.unk_token_id  # see word_tokenizer
        self.pose_tokenizer = PoseTokenizer(TokenizerConfig(**config["tokenizer"]))
        self.vision = DualVision(config["clip"], config["pose_vit"], config["vision"])
        self.vocab = Vocab(len(text) if text else PAPER_TEXT, self.pose_tokenizer.config.codes, self.pose_tokenizer.n_tokens)
        llm = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=False, **config["llm"])
        self.llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=self.vocab.size, **llm))
        self.projector = make_projector(config["projector"], self.vision.width, self.llm.config.hidden_size)
        if config["lora"]:
            add_lora(self.llm.model.layers, config["lora_r"], config["lora_alpha"])

    def grow_lora(self):
        """Freeze the LLM's layers and give each projection a LoRA pair, once."""
        if not self.config["lora"]:
            add_lora(self.llm.model.layers, self.config["lora_r"], self.config["lora_alpha"])
            self.config["lora"] = True

    @property
    def device(self):
        return self.llm.lm_head.weight.device

    def prepare(self, segments):
        """Raw values -> what a sequence holds: pose rotmat (22,3,3) -> N codes, picture -> features (P,Dv).
        Values that were prepared already (integer codes, float features of rank 2) pass through."""
        ready = []
        with torch.no_grad():
            for kind, value, said in segments:
                if kind == "pose" and torch.is_tensor(value) and value.is_floating_point():
                    value = self.pose_tokenizer.encode(value[None].to(self.device))[0].tolist()  # N codes
                elif kind == "image" and not (torch.is_tensor(value) and value.dim() == 2):
                    value = self.vision([value])[0]                                      # (P,Dv)
                ready.append((kind, value, said))
        return ready

    def text_ids(self, text):
        """Text -> ids. A `</s>` or `[/INST]` that somebody typed is an unknown word, not a mark of the sequence."""
        marks = {self.text_tokenizer.bos_token_id, self.text_tokenizer.eos_token_id, *(ids[0] for ids in self.prompt_marks if len(ids) == 1)}
        ids = self.text_tokenizer(text, add_special_tokens=False).input_ids
        return [self.text_tokenizer.unk_token_id if i in marks else i for i in ids]

    @property
    def prompt_marks(self):
        """The ids of what opens and closes a prompt."""
        return [self.text_tokenizer(mark, add_special_tokens=False).input_ids for mark in ("[INST] ", " [/INST]")]

    def encode(self, segments):
        """Segments -> Sequence; see the function `encode`."""
        segments, prompt_marks = self.prepare(segments), self.prompt_marks
        if not self.is_word_level:
            segments, prompt_marks = self.tokenize_official(segments), ([], [])
        return encode(segments, self.vocab, self.text_ids, prompt_marks, self.text_tokenizer.bos_token_id, self.text_tokenizer.eos_token_id,
                      self.vision.n_patches, self.config["attn"])

    def tokenize_official(self, segments):
        """What a model of word pieces reads: every text as ids, joined and cut as in the official training.

        The row is `[INST] prompt [/INST] answer </s>` with the spaces that stand here. Texts side by side are one
        string, since pieces may span them, and a string that follows a pose or picture begins anew, with its own `▁`.
        A target pose is said as `<p> … </p>.`
        """
        given, said = ([s for s in segments if s[2] is target] for target in (False, True))
        if said:
            full_stop = [("text", ".", True)] * (said[-1][0] == "pose")
            said = [("text", " ", True), *said, *full_stop, ("text", " ", True)]
        rules = str(self.text_tokenizer.backend_tokenizer.normalizer)
        first = " " if "Replace" in rules and "Prepend" not in rules else ""  # see word_pieces
        row = [("text", first + "[INST] ", False), *given, ("text", " [/INST]", False), *said]
        spelled = []
        for is_text, run in groupby(row, lambda segment: segment[0] == "text"):
            run = list(run)
            if is_text:
                ids = self.text_ids("".join(value for _, value, _ in run))
                n = len(self.text_ids("".join(value for _, value, target in run if not target)))
                run = [("ids", part, target) for part, target in ((ids[:n], False), (ids[n:], True)) if part]
            spelled += run
        return spelled

    @property
    def answer_prefix(self):
        """The ids that an answer says before a pose: the space after `[/INST]` is a piece of its own, `▁`."""
        return [] if self.is_word_level else self.text_ids(" [/INST] ")[len(self.text_ids(" [/INST]")):]

    def decode_text(self, ids):
        """Text ids -> text."""
        text = self.text_tokenizer.decode(ids)
        return tidy_text(text) if self.is_word_level else text.strip()

    def embed(self, ids, code_index, images=None):
        """ids, code_index (B,T), images (n,P,Dv) or None -> (B,T,D); projected patches fill the IMAGE positions in order.

        A code word means another thing at every place of a pose, and rotary positions are relative: a 7B model works
        the place out, a model of four layers hardly does. With config["code_positions"] a code that is read also carries the
        embedding of the query of its place, which costs no parameter (not in the paper; off in its size)."""
        x = self.llm.model.embed_tokens(ids.clamp(min=0))                                # (B,T,D)
        if self.config["code_positions"]:
            places = self.llm.model.embed_tokens(self.vocab.query0 + code_index.clamp(min=0))  # (B,T,D)
            x = x + places * (code_index >= 0)[..., None]
        if images is not None:
            patches = self.projector(images.to(x))                                       # (n,P,D)
            x = x.masked_scatter((ids == IMAGE_PLACEHOLDER)[..., None], patches.to(x.dtype))
        return x

    def hidden(self, x, mask, positions, cache=None):
        """Embeddings (B,q,D), float mask (B,1,q,past+q), positions (B,q) -> last hidden states (B,q,D)."""
        return self.llm.model(inputs_embeds=x, attention_mask=mask.to(x.dtype).clamp(min=torch.finfo(x.dtype).min),
                              position_ids=positions, past_key_values=cache,
                              use_cache=cache is not None).last_hidden_state

    def forward(self, batch):
        """A collated batch -> (loss, logs). Cross-entropy summed over labelled positions / how many there are.

        batch: ids, labels, block, code_index, valid (B,T), images (n,P,Dv) or None, as `collate` makes it. `lm_head` runs on
        labelled positions only. Every target pose's `</p>` counts in the denominator though nothing predicts it, as in
        the official loss. logs: "terms" that number, and (how many right, of how many) codes and words.
        """
        batch = {k: v if v is None else v.to(self.device) for k, v in batch.items()}
        positions = (batch["valid"].cumsum(1) - 1).clamp(min=0)                          # (B,T)
        x = self.embed(batch["ids"], batch["code_index"], batch["images"])                     # (B,T,D)
        h = self.hidden(x, mixed_mask(batch["block"], batch["valid"]), positions)        # (B,T,D)
        said = batch["labels"] != IGNORE_INDEX
        labels = batch["labels"][said]                                                   # (n,)
        logits = self.llm.lm_head(h[said]).float()                                       # (n,vocabulary)
        terms = len(labels) + (labels == self.vocab.p_open).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum") / terms
        right = logits.detach().argmax(-1) == labels
        pose = (labels >= self.vocab.pose0) & (labels < self.vocab.p_open)
        return loss, {"terms": terms, "pose_acc": (right[pose].sum(), pose.sum()),
                      "text_acc": (right[~pose].sum(), (~pose).sum())}


# ---- 7. Checkpoints ----------------------------------------------------------------------------------------------
RETRIEVAL_PREFIX = "retrieval."  # keys of the evaluation's retrieval_model, which travels in the same file (eval.py)


def provenance():
    """What made this file: command, git hash where there is one, package versions."""
    import safetensors
    import transformers
    here = pathlib.Path(__file__).parent
    asked = ["git", "rev-parse", "--short", "HEAD"]
    git = shutil.which("git") and subprocess.run(asked, cwd=here, text=True, capture_output=True).stdout.strip()
    return {"command": " ".join(["python", pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
            "git": git or "none", "torch": torch.__version__, "transformers": transformers.__version__,
            "safetensors": safetensors.__version__, "python": sys.version.split()[0]}


def save(model, folder, half=False, extra=None, **notes):
    """Write config.json, model.safetensors and tokenizer.json to `folder`: all are complete before one is renamed.

    half: float16, but for the tokenizer's running sums, which outgrow it. extra: more tensors by name (the retrieval_model's).
    notes: anything for config.json (stages, seed, …). Raises UserError when the disk is full or the folder is none.
    """
    from safetensors.torch import save_file
    folder, state = pathlib.Path(folder), {**model.state_dict(), **(extra or {})}
    if half:
        state = {k: v.half() if v.is_floating_point() and ".code_" not in k else v for k, v in state.items()}
    config = {**model.config, "float16": half, **provenance(), **notes}
    with (atomic_write(folder / "config.json") as words, atomic_write(folder / "tokenizer.json") as text,
          atomic_write(folder / "model.safetensors") as weights):
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, weights)
        model.text_tokenizer.backend_tokenizer.save(str(text))
        words.write_text(json.dumps(config, indent=1) + "\n")


def read_config(folder):
    """config.json of a weights folder as a dict; UserError when the folder or the file is not there or not readable.
    The official cache folder has none: what its files tell."""
    folder = pathlib.Path(folder)
    if is_official(folder):
        return official_config(folder)
    if not folder.is_dir():
        raise UserError(f"there is no weights folder at {folder}; give --weights, or run `python train.py --stage all`")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(f"the weights folder {folder} has no {name}; it is not a finished checkpoint of train.py")
    config = read_json(folder / "config.json")
    missing = [key for key in MODEL_KEYS if key not in config]
    if missing:
        raise UserError(f"{folder / 'config.json'} lacks {', '.join(missing)}; it does not describe a UniPose model")
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            raise UserError(f"{folder / 'config.json'} says {key} {config[key]!r}, not one of {', '.join(choices)}")
    return config


def read_tensors(path):
    """Every tensor of a safetensors file, float16 turned to float32. Raises UserError when it is truncated, something
    else, or holds NaN."""
    from safetensors.torch import load_file
    with as_user_error(f"{path} is not a complete safetensors file (", "); copy or train it again"):
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{broken[0]} in {path} holds NaN or infinite numbers; train it again with a lower --lr")
    return state


def load(folder, device="cpu"):
    """A weights folder -> UniPose in eval mode, float32. Strict: raises UserError with the difference where names or
    shapes do not fit. Tensors of the retrieval_model (`retrieval.`) are left to eval.py. The official folder is read as bfloat16
    on a GPU."""
    if is_official(folder):
        return load_official(folder, device, torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    from tokenizers import Tokenizer
    config, folder = read_config(folder), pathlib.Path(folder)
    with blame_description(folder), torch.random.fork_rng():  # building draws random numbers; loading must not disturb others
        text = fast_tokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))
        model = UniPose({key: config[key] for key in MODEL_KEYS}, text)
    state = {k: v for k, v in read_tensors(folder / "model.safetensors").items() if not k.startswith(RETRIEVAL_PREFIX)}
    load_strictly(model, state, folder / "model.safetensors")
    return model.to(device).eval()


def find_device(name=""):
    """"" -> the GPU where there is one, else the CPU; any other name -> itself. Raises UserError where there is none."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with as_user_error(f"--device {name} cannot be used here (", "); leave it out"):
        return str(torch.zeros(1, device=name).device)


def load_strictly(model, state, where):
    """`load_state_dict` that says what differs, in one sentence (UserError)."""
    compare(*({name: tensor.shape for name, tensor in side.items()} for side in (model.state_dict(), state)), where)
    model.load_state_dict(state)


def compare(want, have, where):
    """Raises UserError where names or shapes, {name: shape}, are not as wanted: the first three differences."""
    wrong = [f"{k} is {tuple(have[k])}, expected {tuple(v)}" for k, v in want.items() if k in have and have[k] != v]
    wrong += [f"{k} is missing" for k in want if k not in have] + [f"{k} is unknown" for k in have if k not in want]
    if wrong:
        more = f" and {len(wrong) - 3} more differences" if len(wrong) > 3 else ""
        raise UserError(f"{where} does not fit its config.json: {'; '.join(wrong[:3])}{more}")


# ---- 8. Other people's weights: how their names map to ours ------------------------------------------------------
key_tables = functools.partial(load_asset, "names")  # a table a kind of file: how a name begins there -> here; and inside it
COMPUTED = ("rotary_emb.inv_freq", "position_ids")  # constants that old files carry along
TABLES = ("llm.model.embed_tokens.weight", "llm.lm_head.weight")  # one row for each id of the vocabulary
NOT_IN_TENSORS = {"num_attention_heads", "max_position_embeddings", "rms_norm_eps", "layer_norm_eps", "rope_parameters",
        "attention_bias", "mlp_bias", "hidden_act"}  # what no tensor tells
BASE = "llava-v1.6-mistral-7b"


def blame_description(folder):
    """`with described(folder):` what goes wrong in here is the fault of the descriptions in `folder` (UserError)."""
    return as_user_error(f"the JSON files in {folder} do not describe a model (", "); copy it again")


def official_path(cache, *names):
    """The path of a file in the official folder; UserError, with its origin, where it is missing."""
    path = pathlib.Path(cache, *names)
    if not path.exists():
        raise UserError(f"{path} is missing; get it from {key_tables()['origins'][names[0]]}")
    return path


def read_json(path):
    """A JSON object -> dict. Raises UserError."""
    with as_user_error(f"{path} cannot be read as JSON (", "); copy the folder again"):
        return {**json.loads(pathlib.Path(path).read_text())}


def shards(folder):
    """The weight files of a Hugging Face folder, in order. Raises UserError where one is missing."""
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    named = {name for index in folder.glob("*.index.json") for name in read_json(index).get("weight_map", {}).values()
             if not found or name.endswith(found[0].suffix)}
    missing = sorted(named - {path.name for path in found}) if found else ["model.safetensors"]
    if missing:
        origin = key_tables()["origins"].get(folder.name, "its first place")
        raise UserError(f"{folder / missing[0]} is missing; get it from {origin}")
    return [path for path in found if path.name in named or not named]


def read_file(path):
    """{name: tensor} of a safetensors or torch file, mapped into memory: what nobody touches stays on disk.

    A torch file is a pickle: nothing in it runs, and the yacs settings that TokenHMR keeps beside its weights become a
    plain dict. Raises UserError."""
    from safetensors.torch import load_file
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            held = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: tensor for name, tensor in held.get("state_dict", held).items() if torch.is_tensor(tensor)}
    except Exception as error:  # a damaged or hostile file can fail anywhere
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks to run {asked[1]}" if asked else first_line(error)[:100]
        raise UserError(f"{path} is not a complete file of weights ({why}); get it again, from whom you trust") from None


def rename_keys(path, names):
    """The tensors of a file under our names. Raises UserError at a name that the table does not know."""
    ours = {}
    for theirs, tensor in read_file(path).items():
        begin = next((begin for begin in names if theirs.startswith(begin)), None)
        if begin is None:
            raise UserError(f"{path} holds {theirs}, which no part of UniPose is called; is it another model's file?")
        if not names[begin] or theirs.endswith(COMPUTED):
            continue
        name = names[begin] + theirs.removeprefix(begin)
        for inner, mine in key_tables()["inner"].items():
            name = name.replace(inner, mine)
        cut = ("query", "key", "value") if ".qkv." in name else ("qkv",)  # three matrices in one
        ours |= {name.replace("qkv", one): rows for one, rows in zip(cut, tensor.chunk(len(cut)))}
    if "tied" in names and TABLES[0] in ours:
        ours[TABLES[1]] = ours[TABLES[0]]  # small Llamas read and say with one table
    return ours


def tensor_shapes(files):
    """What files hold together: {our name: (shape, path of the last file that has it)}. files: (path, names) pairs."""
    return {name: (tensor.shape, path) for path, names in files for name, tensor in rename_keys(path, names).items()}


def load_weights(model, files, device, dtype, made=(), text_rows=0):
    """Give a model built on the meta device its weights, file by file: memory holds the model and one file, no more.

    files: (path, names) pairs, the last that holds a tensor counts. made: beginnings of names that are in no file.
    text_rows: take so many rows of embedding and head; the others begin at their mean. Strict both ways: raises UserError
    where names, shapes or values are not as they must be.
    """
    homes = {name.replace(".base.", "."): name for name in model.state_dict() if not name.startswith(made)}
    want, held = {name: model.state_dict()[home].shape for name, home in homes.items()}, tensor_shapes(files)
    have = {name: want[name] if text_rows and name in TABLES else shape for name, (shape, _) in held.items()}
    compare(want, have, ", ".join(dict.fromkeys(str(path) for path, _ in files)))

    def settled(name, tensor, path):
        if not tensor.isfinite().all():
            raise UserError(f"{name} in {path} holds NaN or infinite numbers; get the file again")
        if text_rows and name in TABLES:
            tensor = tensor[:text_rows]
            tensor = torch.cat([tensor, tensor.mean(0, keepdim=True).expand(want[name][0] - len(tensor), -1)])
        return tensor.to(device, torch.float32 if name.startswith("pose_tokenizer.") else dtype, copy=True)

    for path, names in tqdm(files, desc="weights", leave=False, delay=2):  # any tensor left over would hold its file
        part = {homes[name]: settled(name, tensor, path) for name, tensor in rename_keys(path, names).items()
                if held[name][1] == path}
        model.load_state_dict(part, strict=False, assign=True)
    rotary, eye = model.llm.model.rotary_emb, model.vision.clip.embeddings  # constants, which the meta device lacks
    model.llm.model.rotary_emb = type(rotary)(model.llm.config)
    eye.position_ids = torch.arange(eye.position_embedding.weight.size(0))[None]
    return model.to(device).eval()


def infer_config(files, llm, clip, vit):
    """Sizes of LLM and eyes for config.json, from the tensors in `files`. Raises UserError where a part is missing.

    llm, clip, vit: what their own config.json says, for what no tensor tells. A pose ViT often comes without one: ViT-H
    has 16 heads, and of smaller ones no head is taken to have less than 16 channels."""
    from transformers import AutoConfig
    shape, eye, pose, first = tensor_shapes(files), "vision.clip.", "vision.pose_vit.", "llm.model.layers.0."

    def size(name, axis=0):
        if name not in shape:
            raise UserError(f"{', '.join(str(path) for path, _ in files)}: none of them holds {name}")
        return shape[name][0][axis]

    def depth(begin):
        return len({name[len(begin):].split(".")[0] for name in shape if name.startswith(begin)})

    llm, clip = llm.get("text_config", llm), clip.get("vision_config", clip)
    kind = str(llm.get("model_type")).removeprefix("llava_")
    if kind not in ("llama", "mistral"):
        raise UserError(f"config.json beside {files[0][0]} says model_type {kind}; Llama, Mistral and LLaVA are read")
    llm = AutoConfig.for_model(kind, **{key: value for key, value in llm.items() if key != "model_type"}).to_dict()
    llm, clip, vit = ({key: value for key, value in told.items() if key in NOT_IN_TENSORS} for told in (llm, clip, vit))
    channels = size(first + "self_attn.q_proj.weight") // llm["num_attention_heads"]
    patch, high, wide = (size(name, axis) for name, axis in (
        (eye + "embeddings.patch_embedding.weight", 2), (pose + "embeddings.patch_embeddings.projection.weight", 2),
        (pose + "embeddings.patch_embeddings.projection.weight", 3)))
    side = math.isqrt(size(eye + "embeddings.position_embedding.weight"))  # one place more, for the class
    width, unit = size(pose + "layernorm.weight"), math.isqrt(size(pose + "embeddings.position_embeddings", 1) // 12)
    heads = next(n for n in (16, 12, 8, 4, 2, 1) if width % (16 * n) == 0 or n == 1)
    return {"llm": {"model_type": kind, "hidden_size": size("llm.model.norm.weight"), "head_dim": channels,
                    "num_hidden_layers": depth("llm.model.layers."), "sliding_window": None,
                    "num_key_value_heads": size(first + "self_attn.k_proj.weight") // channels,
                    "intermediate_size": size(first + "mlp.up_proj.weight"), **llm},
            "clip": {"hidden_size": size(eye + "pre_layrnorm.weight"), "image_size": side * patch, "patch_size": patch,
                     "num_hidden_layers": depth(eye + "encoder.layers."),
                     "intermediate_size": size(eye + "encoder.layers.0.mlp.fc1.weight"), **clip},
            "pose_vit": {"hidden_size": width, "num_hidden_layers": depth(pose + "encoder.layer."),
                         "image_size": [4 * unit * high, 3 * unit * wide], "patch_size": [high, wide],  # people stand
                         "mlp_ratio": size(pose + "encoder.layer.0.mlp.fc1.weight") // width,
                         "num_attention_heads": heads, **vit}}


def word_pieces(folder):
    """The text tokenizer of a Hugging Face folder, from tokenizer.json, else from tokenizer.model by `sentencepiece`.

    A sentencepiece model is taken as the official slow tokenizer reads it: each string that it is given gets a `▁` in
    front, or with `legacy` false only the first one does (`UniPose.tokenize_official`). Raises UserError."""
    from tokenizers import Tokenizer, decoders, normalizers
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    with blame_description(folder):
        text = Tokenizer.from_str(file.read_text()) if file.exists() else sentence_pieces(folder / "tokenizer.model")
    if text.token_to_id("▁") is None:
        return fast_tokenizer(text)
    text, anew = Tokenizer(text.model), not settings.exists() or read_json(settings).get("legacy") is not False
    text.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * anew + [normalizers.Replace(" ", "▁")])
    text.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast_tokenizer(text)  # without the added tokens of the file: our vocabulary puts its own after the text


def sentence_pieces(path):
    """tokenizer.model -> the same byte pair encoding in `tokenizers`: two pieces that make a third may merge, those of
    high rank first. Raises UserError where the package or the file is missing, or where the two disagree."""
    from tokenizers import Tokenizer, models
    with as_user_error(f"{path} cannot be read (",
                    "); it takes the file and `pip install sentencepiece`, or else a tokenizer.json beside it"):
        import sentencepiece
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    plain = [i for i in ids.values() if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))]
    ranked = [pieces.id_to_piece(i) for i in sorted(plain, key=pieces.get_score, reverse=True)]
    merges = [(p[:k], p[k:]) for p in ranked for k in range(1, len(p)) if p[:k] in ids and p[k:] in ids]
    text = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    probe = "é  ".join(ranked).replace("▁", " ")
    if text.encode("▁" + probe.replace(" ", "▁")).ids != pieces.encode(probe):
        raise UserError(f"{path} is not a byte pair encoding like Llama's; give a folder with tokenizer.json")
    return text


def added_token_names(vocab):
    """What the official tokenizer calls the ids after the text, in order."""
    return [*(f"<pose_id_{i}>" for i in range(vocab.codes + 2)), "<im_start>", "<im_end>",
            *(f"<pose_query_{i}>" for i in range(vocab.n_tokens))]


def is_official(folder):
    """Is this the official folder `cache`? Known by what lies in it, also where a part is missing."""
    folder = pathlib.Path(folder)
    return not (folder / "config.json").exists() and any((folder / name).exists() for name in key_tables()["origins"])


def official_files(cache):
    """The weights of the release as (path, names) pairs. The CLIP folder's are not among them: LLaVA tuned its own."""
    names = key_tables()
    return [*((path, names["llm"]) for path in shards(official_path(cache, BASE))),
            *((official_path(cache, "unipose", name), names["unipose"])
              for name in ("non_lora_trainables.bin", "adapter_model.safetensors")),
            (official_path(cache, "pose_vqvae", "best_MPJPE.ckpt"), names["codes"]),
            (official_path(cache, "tokenhmr_model.ckpt"), names["vit"])]


def official_config(cache, **vit):
    """What config.json would say of the release in `cache`; vit as in `measure`. Raises UserError."""
    files, clip = official_files(cache), official_path(cache, "clip-vit-large-patch14-336", "config.json")
    lora, held = read_json(official_path(cache, "unipose", "adapter_config.json")), tensor_shapes(files[-2:-1])
    with blame_description(cache):
        sizes = infer_config(files, read_json(official_path(cache, BASE, "config.json")), read_json(clip), vit)
    home = pathlib.Path(str(lora.get("base_model_name_or_path"))).name
    if home != BASE or lora.get("use_dora") or lora.get("use_rslora"):
        raise UserError(f"the adapter in {pathlib.Path(cache, 'unipose')} is for {home}, and plain LoRA for {BASE} is "
                      f"wanted; get the folder from {key_tables()['origins']['unipose']}")
    codes, code_dim = held["pose_tokenizer.quantizer.codebook"][0]
    layers = max(int(name.split(".")[3]) for name in held if name.startswith("pose_tokenizer.encoder."))
    tokens = dict(hidden=held["pose_tokenizer.encoder.encoder.0.bias"][0][0], code_dim=code_dim, codes=codes,
                  upsample_step=(layers - 7) // 3, z_up=True)  # three layers each time the axis is doubled
    return {"size": "paper", "prompt_style": "released", "projector": "mlp", "vision": "both", "attn": "mixed", **sizes, "tokenizer": tokens,
            "code_positions": False, "lora": True, "lora_r": lora.get("r"), "lora_alpha": lora.get("lora_alpha"),
            "stages": ["backbones", "tokenizer", "align", "project", "instruct"], "seconds": {}, "commands": {}}


def load_official(cache, device="cpu", dtype=torch.float32, merge=True, **vit):
    """The folder `cache` of the official release -> UniPose in eval mode. Raises UserError.

    merge: fold LoRA in, or keep it to train on. vit: see `measure`. The pose tokenizer stays in float32. Official
    poses live in AMASS's world, z up; this model takes and gives ours, y up: its tokenizer turns them."""
    config, text = official_config(cache, **vit), word_pieces(official_path(cache, "unipose"))
    with blame_description(cache), torch.device("meta"):
        model = UniPose({key: config[key] for key in MODEL_KEYS}, text)
    added = read_json(official_path(cache, "unipose", "added_tokens.json"))
    rows = tensor_shapes(official_files(cache))[TABLES[0]][0][0]
    astray = [name for i, name in enumerate(added_token_names(model.vocab), model.vocab.n_text) if added.get(name) != i]
    if astray or rows != model.vocab.size:
        raise UserError(f"{pathlib.Path(cache, 'unipose')}: the embedding has {rows} rows, text, codes and marks need "
                      f"{model.vocab.size}" + "".join(f", and {name} is not where it must be" for name in astray[:1]))
    model.pose_tokenizer.quantizer = quantizer = Quantizer(model.pose_tokenizer.config)  # their file has forgotten the sums
    load_weights(model, official_files(cache), device, dtype, ("pose_tokenizer.quantizer.code_", "pose_tokenizer.quantizer.initialised"))
    quantizer.code_sum.copy_(quantizer.codebook)
    quantizer.initialised.fill_(True)
    if merge:
        merge_lora(model.llm.model.layers)
        model.config["lora"] = False
    return model


def base_model(config, llm, clip, pose_vit):
    """config's model with downloads for its LLM and eyes, in float32; the rest starts untrained (paper §3.3).

    llm: a folder of Llama, Mistral or LLaVA; clip: a CLIP folder, "" for LLaVA's own; pose_vit: an HMR2 or TokenHMR
    checkpoint, or a VitPoseBackbone folder. Raises UserError."""
    llm, eye, pose_vit = pathlib.Path(llm), pathlib.Path(clip or llm), pathlib.Path(pose_vit)
    told, vit = read_json(llm / "config.json"), read_json(pose_vit / "config.json") if pose_vit.is_dir() else {}
    vit = vit.get("backbone_config", vit)
    names, tied = key_tables(), {"tied": ""} if told.get("tie_word_embeddings") else {}
    files = [*((path, names["llm"] | tied) for path in shards(llm)),
             *((path, names["clip"]) for path in (shards(eye) if clip else [])),
             *((path, names["vit"]) for path in (shards(pose_vit) if pose_vit.is_dir() else [pose_vit]))]
    with blame_description(f"{llm}, {eye} or {pose_vit}"), torch.device("meta"):
        model = UniPose(config | infer_config(files, told, read_json(eye / "config.json"), vit), word_pieces(llm))
    model.pose_tokenizer = PoseTokenizer(TokenizerConfig(**config["tokenizer"]))
    model.projector = make_projector(config["projector"], model.vision.width, model.llm.config.hidden_size)
    return load_weights(model, files, "cpu", torch.float32, ("pose_tokenizer.", "projector."), model.vocab.n_text)


def write_llm(model, folder):
    """The LLM alone, LoRA merged, as a folder that AutoModelForCausalLM and AutoTokenizer read. Raises UserError."""
    from safetensors.torch import save_file
    merge_lora(model.llm.model.layers)
    model.llm.config.architectures = [type(model.llm).__name__]
    text = copy.deepcopy(model.text_tokenizer)
    text.add_tokens(added_token_names(model.vocab))
    with atomic_write(pathlib.Path(folder) / "model.safetensors") as weights:
        save_file({k: v.contiguous() for k, v in model.llm.state_dict().items()}, weights, {"format": "pt"})
    model.llm.config.save_pretrained(folder)
    text.save_pretrained(folder)
    print(f"wrote the LLM to {folder}")


# ---- 9. Look at it -----------------------------------------------------------------------------------------------
def parameter_table(model):
    """Rows (part, parameters, of them in LoRA) of the model's top-level parts, largest last row the sum."""
    rows = []
    parts = {"pose tokenizer": model.pose_tokenizer, "CLIP": model.vision.clip, "pose ViT": model.vision.pose_vit,
             "projector": model.projector, "embeddings": model.llm.model.embed_tokens,
             "LLM layers": model.llm.model.layers, "LM head": model.llm.lm_head}
    for name, part in parts.items():
        lora = sum(p.numel() for n, p in part.named_parameters() if n.endswith((".A", ".B")))
        rows.append((name, sum(p.numel() for p in part.parameters()), lora))
    return rows + [("all", sum(r[1] for r in rows), sum(r[2] for r in rows))]


def memory_table(model, tokens=1024):
    """Rows (stage, numbers that learn, GB of the model, GB more for each row of so many tokens), in bfloat16.

    A number takes 2 bytes, 4 in the pose tokenizer, and 16 where it learns: itself, its gradient, AdamW's memories, all
    float32. A row takes its keys and values, or in training (--checkpointing) all layers' inputs and one's inside."""
    llm, sizes, rows = model.llm.config, {name: p.numel() for name, p in model.named_parameters()}, []
    depth, width = llm.num_hidden_layers, llm.hidden_size
    keys = 2 * depth * llm.num_key_value_heads * width // llm.num_attention_heads
    for stage in ("answer", "tokenizer", "align", "project", "instruct"):
        pattern = TRAINABLE.get(stage, "$")            # an answer trains nothing
        learning = sum(n for name, n in sizes.items() if re.match(pattern, name))
        held = sum(n * (16 if re.match(pattern, name) else 4 if name.startswith("pose_tokenizer.") else 2)
                   for name, n in sizes.items())
        row = {"answer": keys, "tokenizer": 0}.get(stage, (depth + 8) * width + 4 * llm.intermediate_size)
        rows.append((stage, learning, held / 1e9, 2 * tokens * row / 1e9))
    return rows


@dataclass
class Config:
    """Draw the mask of a small sequence, count the parameters of a model and its memory; or copy a checkpoint."""
    weights: str = TINY  # a trained folder to count, or to copy with --half
    size: str = ""  # nano | tiny | paper: count this size instead, without weights and with 32,000 text pieces
    half: str = ""  # write the folder --weights here in float16, LoRA merged
    merge: str = ""  # write the LLM of --weights here as a plain Hugging Face folder, LoRA merged


def copy_half(source, target):
    """Copy a checkpoint: LoRA merged, float16, the retrieval_model and the notes of config.json kept."""
    config, model = read_config(source), load(source)
    merge_lora(model.llm.model.layers)
    model.config["lora"] = False
    state = read_tensors(pathlib.Path(source) / "model.safetensors") if "retrieval" in config else {}
    extra = {k: v for k, v in state.items() if k.startswith(RETRIEVAL_PREFIX)}
    notes = {k: v for k, v in config.items() if k not in {*model.config, "float16"}}
    save(model, target, half=True, extra=extra, **notes)
    print(f"wrote {target}: {sum(f.stat().st_size for f in pathlib.Path(target).iterdir()) / 1e6:.1f} MB")


def main():
    """Draws the mask and counts, or copies a checkpoint."""
    config = cli(Config)
    if config.half:
        return copy_half(config.weights, config.half)
    if config.merge:
        return write_llm(load(config.weights), config.merge)
    if config.size and config.size not in SIZES:
        raise UserError(f"--size {config.size} is not one of {', '.join(SIZES)}")
    names = ["a word", "a word", "<p>", *["query"] * 4, "</p>", "a word"]
    print("who (row) may look at whom (column)\n")
    for name, row in zip(names, show_mask([-1, -1, -1, 0, 0, 0, 0, -1, -1]).split("\n")):
        print(f"{row}   {name}")
    if config.size:
        with torch.device("meta"):
            model = UniPose(model_config(config.size))
            if model.config["lora_r"]:
                model.grow_lora()
    else:
        model = load(config.weights)
    v = model.vocab
    print(f"\nvocabulary  text 0..{v.n_text - 1} | pose {v.pose0}..{v.p_open - 1} | <p> {v.p_open} </p> {v.p_close} | "
          f"<img> {v.img_open} </img> {v.img_close} | queries {v.query0}..{v.size - 1}\n")
    print(f"{'part':<16}{'parameters':>16}{'of them LoRA':>16}")
    for name, n, lora in parameter_table(model):
        print(f"{name:<16}{n:>16,}{lora:>16,}")
    if config.size:
        print(f"\n{'bfloat16':<16}{'numbers learn':>16}{'GB':>16}{'a row of 1,024':>16}")
        for stage, learning, held, row in memory_table(model):
            print(f"{stage:<16}{learning:>16,}{held:>16.2f}{row:>16.2f}")


if __name__ == "__main__":
    run_main(main)
