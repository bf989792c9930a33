"""Train UniPose, stage by stage, with one training loop.

A stage trains a few parts of the model and freezes the rest (paper §3.3):

    backbones ─────────────────┐
    tokenizer ────► align ─────┴────► project ────► instruct ────► reason         retrieval

    stage       trains                            on
    backbones   small CLIP, small pose ViT        photographs of people and groups; stand-ins
                                                  for two downloads
    tokenizer   the VQ-VAE                        poses (§3.1)
    retrieval   the retrieval model of eval.py    poses and captions (B.2); not part of UniPose
    align       the LLM                           tasks of poses and texts
    project     the projector                     tasks with images
    instruct    the projector, the LLM by LoRA    all seven tasks, 200 instructions each
    reason      the same                          also groups, implied poses, conversations
    reward      the LLM by LoRA                   what can be checked of poses; not in the paper

A stage is a row of STAGES and a function that returns its modules and its loss; the loop knows
nothing else about it. The samples of a step are a function of (seed, step), so a resumed run is
bit-identical to an uninterrupted one. The gradient of a step is the mean over all labels of its
batch, however the batch is split: into --accumulate parts, or over the processes of torchrun.

The baseline of the paper is a flag: --pose_head mlp trains ChatPose, which answers a pose by one
hidden state and reads none. It goes through the same stages with the same steps, less the tokenizer
and the tasks that show a pose; `model_config` has what else follows. Its align learns text2pose
only, so its LLM first writes texts in instruct: ChatPose starts from an LLM that can. Keep that
align short (--steps): a query that has long learned from texts alone ignores pictures later.

Left out: sharding (each process holds the whole model), and validation during training (eval.py).

Letters: B samples of a batch, J=22 joints, N codes of a pose, C numbers of a code, P patches of an
image, Dv channels of a patch, D width of the LLM.

    python train.py --stage all --size nano                      # everything, in 12 s on one thread
    python train.py --stage all --size tiny --out out/tiny       # the course of weights/tiny
    python train.py --stage align --out out/tiny --resume        # continue after an interruption
    python train.py --stage all --out out/causal --attn causal   # an ablation (paper Table 7)
    python train.py --stage project,instruct --vision clip --init out/tiny --out out/clip  # branch
    python train.py --stage all --out out/chatpose --pose_head mlp   # another system, ChatPose
    torchrun --nproc_per_node=4 train.py --stage all --out out/tiny             # four GPUs
"""
import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from data import (
    CELL, N_TEMPLATES, PICTURE_SIZE, POOL, REASONING, SEVEN, TASKS, Mixture, World, answerable,
    contact_sheet, crop_picture, open_picture, read_records, render_template, save_png, share_shown,
    square, task_values, templates, vocabulary,
)
from eval import Retrieval, load_retrieval_model, tokenize_texts
from sample import demand_of
from tokenizer import (
    MIRROR, UserError, atomic_write, augment, cli, delete_leftovers, face_front, load_body,
    load_json, matrix_to_sixd, mirror, progress_bar, run_main, sample_vertices, tokenizer_loss,
)
from unipose import (
    CHECKPOINT_FILES, CHOICES, EXACT, POSE_CHARACTERS, RETRIEVAL_PREFIX, SIZES, TRAINABLE,
    WITHOUT_CODES, DualVision, Row, UniPose, adapts_llm, base_model, cast_frozen, change_pose_head,
    collate, copy_history, default_dtype, find_device, git_hash, load, make_projector, merge_lora,
    model_config, provenance, read_config, read_tensors, save, set_threads, trainable,
    word_tokenizer,
)

# ---- 1. The stages -------------------------------------------------------------------------------
IMAGE_TASKS = tuple(task for task in SEVEN if "image" in TASKS[task].inputs)
POSE_TASKS = tuple(task for task in SEVEN if task not in IMAGE_TASKS)
GROUP_TASKS = tuple(task for task, row in TASKS.items() if row.group)


class Stage(NamedTuple):
    """One row of STAGES; unipose.TRAINABLE names the parameters that the stage trains."""

    schedule: dict                  # size -> (steps, batch, peak learning rate)
    tasks: tuple = ()               # tasks of the mixture; one named twice is drawn twice as often
    needs: tuple = ()               # stages that must have been trained before
    n_templates: int = 1            # instructions per task; 1: the plain one only
    needs_full_batch: bool = False  # the loss couples the samples of a batch, so it cannot be split


# The paper trains align, project and instruct for 6, 2 and 2 epochs of 163k, 200k and 30k samples
# (Table 3 and the released scripts), the tokenizer for 240 epochs of AMASS, about 200k steps.
STAGES = {
    # stand-ins for two downloads; CLIP's loss is contrastive
    "backbones": Stage(
        needs_full_batch=True,
        schedule={"nano": (20, 8, 1e-3), "tiny": (18_000, 32, 2.5e-3)},
    ),
    # the codebook follows averages over the batch
    "tokenizer": Stage(
        needs_full_batch=True,
        schedule={
            "nano": (30, 32, 1e-3), "tiny": (8000, 128, 1e-3), "paper": (200_000, 256, 2e-4),
        },
    ),
    # contrastive: the texts of a batch compete
    "retrieval": Stage(
        tasks=("pose2text", "posediff"),
        needs_full_batch=True,
        schedule={"nano": (20, 16, 1e-3), "tiny": (1000, 64, 1e-3), "paper": (25_000, 512, 2e-4)},
    ),
    # differences are drawn twice as often, because they are the hardest to learn
    "align": Stage(
        tasks=(*POSE_TASKS, "posediff"),
        needs=("tokenizer",),
        schedule={"nano": (30, 8, 2e-3), "tiny": (20_000, 8, 2e-3), "paper": (10_200, 96, 1.5e-4)},
    ),
    # patches of an image become words that the frozen LLM understands
    "project": Stage(
        tasks=IMAGE_TASKS,
        needs=("backbones", "align"),
        schedule={"nano": (20, 8, 2e-3), "tiny": (300, 16, 2e-3), "paper": (12_500, 32, 5e-5)},
    ),
    # image tasks are drawn three times as often: so far the LLM was frozen when it saw images
    "instruct": Stage(
        tasks=(*SEVEN, *IMAGE_TASKS, *IMAGE_TASKS, "posediff", "imagediff"),
        needs=("project",),
        n_templates=N_TEMPLATES,
        schedule={"nano": (30, 8, 1e-3), "tiny": (22_000, 8, 1.5e-3), "paper": (1_900, 32, 5e-5)},
    ),
    # the seven tasks stay in the mixture, or they would be forgotten; those with images are still
    # the weakest. It begins with who is meant, see SHARE_OF_WHO_FIRST
    "reason": Stage(
        tasks=(
            *REASONING, *GROUP_TASKS, "reason",
            *SEVEN, *SEVEN, *IMAGE_TASKS, "text2pose", "image2pose",
        ),
        needs=("instruct",),
        n_templates=N_TEMPLATES,
        schedule={"nano": (30, 8, 1e-3), "tiny": (12_500, 16, 1.5e-3), "paper": (1_000, 32, 5e-5)},
    ),
    # poses whose text can be checked, see `reward`
    "reward": Stage(
        tasks=("text2pose", "edit"),
        needs=("instruct",),
        n_templates=N_TEMPLATES,
        schedule={"nano": (20, 8, 1e-3), "tiny": (1_500, 8, 5e-4), "paper": (500, 32, 1e-5)},
    ),
}

# Of the steps of `reason`: they ask only who of a group is meant ("In red, on the left."). Runs
# whose labels were mostly poses and descriptions never learned it: those few words hardly count
SHARE_OF_WHO_FIRST = 0.25

NOISE_STEPS = 30_000  # part noise grows every 5,000 iterations, in six steps (paper B.1)

# size -> (synthetic people, how many of them are photographed)
N_PEOPLE = {"nano": (256, 64), "tiny": (40_000, 40_000), "paper": (40_000, 40_000)}
RETRIEVAL_WIDTH = {"nano": 32, "tiny": 64, "paper": 512}


def column(size):
    """Which column of these tables a size reads: its own, or tiny's for a size of your own."""
    return size if size in N_PEOPLE else "tiny"


@dataclass
class Config:
    """Train one stage of UniPose, several, or all."""
    stage: str = "all"  # or of backbones,tokenizer,retrieval,align,project,instruct,reason,reward
    size: str = "tiny"  # nano | tiny | paper
    out: str = ""  # folder of the checkpoint; empty: out/<size>
    init: str = ""  # start from the checkpoint in this folder instead of the one in --out
    llm: str = ""  # use your own backbones: folder of a Llama, Mistral or LLaVA; needs --pose_vit
    clip: str = ""  # folder of a CLIP, for an --llm that is not a LLaVA
    pose_vit: str = ""  # checkpoint of HMR2 or TokenHMR, or folder of a VitPoseBackbone
    resume: bool = False  # continue the interrupted run in --out; skip stages that are done
    seed: int = 0  # every random number of the run follows from it
    tasks: str = ""  # align to reason: only these of their tasks, separated by commas; empty: all
    steps: int = 0  # steps of the stage; 0: as in STAGES
    batch: int = 0  # samples of a step; 0: as in STAGES
    lr: float = 0.0  # peak learning rate; 0: as in STAGES
    accumulate: int = 0  # parts of a batch, same gradient; 0: short and long rows apart, or 1
    checkpointing: bool = False  # recompute activations backwards: less memory, a third more time
    compile: bool = False  # compile the layers of the LLM: half a minute first, then a sixth faster
    save_every: int = 500  # steps between two states to resume from
    device: str = ""  # cpu | cuda | ...; empty: a GPU if there is one
    threads: int = 0  # threads of the CPU; 0: one for the embedded sizes, all for the paper's
    data: str = ""  # JSON file {stage: {"KIND:PATH": weight}} of real data; empty: synthetic people
    people: int = 0  # synthetic people; 0: as in N_PEOPLE
    photos: int = 0  # how many of them are photographed; 0: as in N_PEOPLE
    attn: str = ""  # mixed (paper) | mixed_all | mixed_image | causal; empty: the checkpoint's
    vision: str = ""  # both (paper) | clip | pose; empty: the checkpoint's, or its head's
    projector: str = ""  # mlp (release) | linear (paper's formula); empty: the checkpoint's, or mlp
    pose_head: str = ""  # codes | mlp (ChatPose) | text; empty: the checkpoint's, or codes
    lora_r: int = -1  # rank of LoRA; 0: train all LLM weights; -1: the checkpoint's, or as in SIZES
    lora_on: str = ""  # all | qv: queries and values; empty: the checkpoint's, or its head's
    joint_weight: float = 0.0  # of a loss on the joints of poses that codes stand for, in metres
    body: str = ""  # SMPL, SMPL-H or SMPL-X file for the losses on joints and vertices; empty: ours
    root_noise: bool = True  # tokenizer: turn poses at random, input and target together
    part_noise: bool = None  # tokenizer: disturb parts of the input only; default: at size paper


# ---- 2. Real data instead of synthetic people ----------------------------------------------------
def tasks_offered(record):
    """The tasks that a record of `data.read_records` can be an example of.

    A picture with both texts and a pose is for tasks that use all three, and for those about the
    picture and its texts, not for those that leave the texts out. A picture with a question shows
    several people: it is for the tasks about a group that its answers fit.
    """
    if "question" in record:
        answers = {"pose": "pose" in record, "text": "texts" in record}
        return tuple(task for task, row in TASKS.items() if row.group and answers[row.target])
    held = set()
    for kind, key in (("image", "image"), ("text", "texts"), ("pose", "pose")):
        if key in record:
            held.add(kind)
    kinds = held - {"pose"} if {"image", "text"} <= held else held

    is_pair = "start" in record
    offered = []
    for task, row in TASKS.items():
        used = {*row.inputs, row.target}
        fits = row.pair == is_pair and row.stage == "instruct"
        if fits and used in (kinds, held):
            offered.append(task)
    return tuple(offered)


class Group(NamedTuple):
    """Records of one data set that offer the same tasks."""

    tasks: set
    records: list
    weight: float  # how often an example comes from this group, relative to the others


class RealData:
    """Takes the place of `Mixture`: [k] -> (task, segments), a pure function of (seed, k).

    weights: {"KIND:PATH": how often an example comes from this data set}; only train splits are
    used. tasks: what the examples are for; none: poses alone. All files are read at once, so that a
    broken one is found before training. Raises UserError.
    """

    def __init__(self, weights, tasks=(), seed=0, n_templates=N_TEMPLATES):
        self.tasks = set(tasks)
        self.seed = seed
        self.n_templates = n_templates
        self.groups = []
        for spec, weight in weights.items():
            self.add(spec, weight)

    def add(self, spec, weight):
        """Reads a data set, "KIND:PATH", and groups its records by the tasks they offer."""
        groups = {}
        for record in read_records([spec]):
            if record.get("split", "train") != "train":
                continue
            offered = tasks_offered(record)
            usable = self.tasks & set(offered) if self.tasks else "pose" in record
            if usable:
                groups.setdefault(offered, []).append(record)
        if not groups:
            purpose = ", ".join(sorted(self.tasks)) or "the tokenizer"
            raise UserError(f"{spec} offers nothing in its train split for {purpose}")

        n = sum(len(records) for records in groups.values())
        for offered, records in groups.items():
            self.groups.append(Group(set(offered), records, weight * len(records) / n))

    def texts(self):
        """All texts of all records."""
        texts = []
        for group in self.groups:
            for record in group.records:
                texts += record.get("texts", ())
        return texts

    def draw(self, k, task=""):
        """Example k -> (record, generator); task: only records that offer it. Raises UserError."""
        wanted = {task} if task else self.tasks
        weights = np.zeros(len(self.groups))
        for i, group in enumerate(self.groups):
            if not wanted or group.tasks & wanted:
                weights[i] = group.weight
        if weights.sum() == 0:
            raise UserError(f"no data set of --data offers {task}")

        rng = np.random.default_rng((self.seed, k))
        group = self.groups[rng.choice(len(weights), p=weights / weights.sum())]
        return group.records[rng.integers(len(group.records))], rng

    def example(self, k, task=""):
        """Example k -> (task, [its inputs in order, its target], generator).

        Poses face front, but those of image2pose are as the camera sees them. If A and B are of one
        sequence, B gets the turn of A, so that its heading beside A's stays (PoseFix's rule, also
        of sample.read_poses).
        """
        record, rng = self.draw(k, task)
        wanted = {task} if task else self.tasks
        task = str(rng.choice(sorted(wanted & set(tasks_offered(record)))))
        row = TASKS[task]

        poses = [torch.tensor(record[key])[None] for key in ("start", "pose") if key in record]
        if row.frame == "body":
            # texts are about people who face front
            reference = poses[0] if record.get("together") else None
            poses = [face_front(pose, reference) for pose in poses]

        def value_of(kind, which):
            if kind == "text":
                return str(rng.choice(record["texts"]))
            if kind == "image":
                prefix = "start_" if row.pair and which == 0 else ""
                return crop_picture(record, PICTURE_SIZE, prefix)
            return poses[which][0]

        if row.group:
            picture = square(open_picture(record["image"]))
            return task, [record["question"], picture, value_of(row.target, 0)], rng
        return task, task_values(task, value_of), rng

    def __getitem__(self, k):
        task, values, rng = self.example(k)
        template = templates(task)[rng.integers(self.n_templates)]
        return task, render_template(task, values, template)


# ---- 3. Outputs of frozen parts, computed once ---------------------------------------------------
class FeatureCache:
    """Codes (of a model without codes: rotations) and image features of all synthetic people,
    computed on first use.

    Stands in for a World in `World.example(cache=...)`: `poses`, `camera_poses` and `image(i)` are
    what the frozen parts of the model make of the World's. One cache serves a whole run, because no
    stage reads a table before the part that computes it has been trained.

    real_data: stage -> RealData, for the stages that do not learn from synthetic people.
    """

    def __init__(self, model, world, n_photos, real_data):
        self.model = model
        self.world = world
        self.n_photos = n_photos
        self.real_data = real_data

    def compute(self, tasks):
        """Fills the tables that these tasks read: accessing a cached property computes it."""
        self.poses
        if any("image" in TASKS[task].inputs or TASKS[task].turn for task in tasks):
            self.camera_poses
            self.features
        if any(TASKS[task].group for task in tasks):
            self.group_features

    def image(self, i):
        """Features (P,Dv) of the photograph of person i."""
        return self.features[i]

    def group_image(self, i):
        """Features (P,Dv) of the photograph of the group that a question about person i is about.
        """
        return self.group_features[i // 2]

    @cached_property
    def poses(self):
        """Codes (n,N) of the poses that face front."""
        return self._in_batches(self._encode, self.world.poses, "pose codes")

    @cached_property
    def camera_poses(self):
        """Codes (n,N) of the poses in the camera's frame."""
        return self._in_batches(self._encode, self.world.camera_poses, "codes of turned poses")

    @cached_property
    def features(self):
        """Features (n_photos,P,Dv) of the photographs, float16 to save memory."""
        pictures, _ = self.photos
        return self._in_batches(self._see, pictures, "image features")

    @cached_property
    def group_features(self):
        """Features (n_photos/2,P,Dv) of the photographs of groups, float16."""
        pictures = [picture for picture, boxes in self.group_photos]
        return self._in_batches(self._see, pictures, "features of groups")

    @cached_property
    def photos(self):
        """The photographs (n_photos,S,S,3) uint8, and their joints (n_photos,22,2) in pixels."""
        pictures = []
        keypoints = []
        for i in progress_bar(range(self.n_photos), "photographs", not is_first()):
            picture, joints = self.world.photo(i)
            pictures.append(picture)
            keypoints.append(joints)
        return np.stack(pictures), torch.tensor(np.stack(keypoints), dtype=torch.float32)

    @cached_property
    def group_photos(self):
        """n_photos/2 photographs of groups: pairs of a picture (S,S,3) uint8 and boxes (n,4)."""
        photos = []
        for i in progress_bar(range(0, self.n_photos, 2), "photographs of groups", not is_first()):
            picture, boxes = self.world.group_photo(self.world.group_of(i))
            photos.append((picture, boxes.astype(np.float32)))
        return photos

    def _encode(self, poses):
        if not self.model.has_codes:
            return poses  # the rotations themselves are learned
        return self.model.pose_tokenizer.encode(poses.to(self.model.device))

    def _see(self, pictures):
        return self.model.vision(pictures).half()

    @torch.no_grad()
    def _in_batches(self, function, rows, name, batch=128):
        """function(rows), in batches and with the model in evaluation mode -> tensor on the CPU."""
        self.model.eval()
        parts = []
        for start in progress_bar(range(0, len(rows), batch), name, not is_first()):
            parts.append(function(rows[start:start + batch]).cpu())
        return torch.cat(parts)


# ---- 4. One function a stage: its modules and its loss -------------------------------------------
class StageRun(NamedTuple):
    """What the loop needs to know about a stage."""

    modules: dict  # name -> module of which at least a part is trained
    loss: object  # (rows, step) -> (loss, logs); the loss is a mean over logs["terms"]
    rows: object = list  # sample numbers -> rows, similar ones side by side; list: the numbers


def sample_index(n, k, seed):
    """Sample k -> one of n people; every epoch visits each once. A pure function of (seed, k)."""
    return int(epoch_order(n, k // n, seed)[k % n])


@lru_cache(4)
def epoch_order(n, epoch, seed):
    """The order (n,) in which an epoch visits n people."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def step_seed(config, step):
    """A seed for the random numbers of one step, so that a resumed run repeats them."""
    return config.seed * 1_000_003 + step


class BackboneHeads(nn.Module):
    """Auxiliary heads for pre-training the small backbones; discarded afterwards.

    Each patch of the pose ViT predicts which joints lie on it. The mean over the patches of a
    person, which is what an LLM gets that attends to this person, predicts 3D joints and rotations.
    CLIP's mean over them matches a coarse caption (`World.coarse_caption`), read as a bag of words.
    """

    def __init__(self, model):
        super().__init__()
        pose_width = model.config["pose_vit"]["hidden_size"]
        clip_width = model.config["clip"]["hidden_size"]
        self.keypoints = nn.Linear(pose_width, 22)
        self.body = nn.Sequential(
            nn.Linear(pose_width, 4 * pose_width), nn.GELU(), nn.Linear(4 * pose_width, 22 * 9))
        self.picture = nn.Linear(clip_width, 64)
        self.words = nn.Embedding(len(model.text_tokenizer), 64)
        self.scale = nn.Parameter(torch.tensor(10.0))


MARGIN = 6  # pixels around the joints of a person


class PhotoBatch(NamedTuple):
    """B photographs and the n people in them; each of the first m photographs shows one person."""

    pictures: list           # B arrays (S,S,3)
    photo: torch.Tensor      # (n,) which of the photographs each person is in
    boxes: torch.Tensor      # (n,4) left, top, width, height in pixels
    poses: torch.Tensor      # (n,22,3,3) in the camera's frame
    keypoints: torch.Tensor  # (m,22,2) pixels, of the people alone
    captions: list           # n coarse captions; in a group with shirt and place


def box_around(keypoints, size):
    """Left, top, width and height (4,) of a person with these keypoints (22,2), in pixels of a
    picture of that size."""
    low = (keypoints.min(0) - MARGIN).clip(0, size)
    high = (keypoints.max(0) + MARGIN).clip(0, size)
    return np.concatenate([low, high - low])


def photo_batch(cache, alone, in_groups):
    """A PhotoBatch of the people `alone`, and of the groups of the people `in_groups` (m > 0, >= 0
    rows of the world)."""
    world = cache.world
    pictures, keypoints = cache.photos

    shown = [pictures[i] for i in alone]
    photo = list(range(len(alone)))
    people = list(alone)
    boxes = [box_around(points, world.size) for points in keypoints[alone].numpy()]
    captions = [world.coarse_caption(i) for i in alone]

    for i in in_groups:
        picture, places = cache.group_photos[i // 2]
        group = world.group_of(i)
        photo += [len(shown)] * len(places)
        shown.append(picture)
        people += group.people
        boxes += [*places]
        for person, shirt, place in zip(group.people, group.shirts, group.places):
            captions.append(f"{world.coarse_caption(person)}, {shirt} shirt, {place}")

    boxes = torch.from_numpy(np.stack(boxes))                                # (n,4)
    return PhotoBatch(shown, torch.tensor(photo), boxes, world.camera_poses[people],
                      keypoints[alone], captions)


def overlap(start, length, n):
    """How much of each of n unit intervals lies in k ranges: start, length (k,) -> (k,n)."""
    edges = torch.arange(n)
    start = start[:, None]
    low = torch.maximum(start, edges)
    high = torch.minimum(start + length[:, None], edges + 1)
    return (high - low).clamp(min=0)


def patch_masks(boxes, patch_size, grid):
    """Which share of each patch lies in each box: boxes (n,4) in pixels, grid h, w -> (n,h,w)."""
    left, top, width, height = (boxes / patch_size).unbind(-1)               # (n,) each
    rows = overlap(top, height, grid[0])                                     # (n,h)
    columns = overlap(left, width, grid[1])                                  # (n,w)
    return rows[:, :, None] * columns[:, None, :]


def person_features(features, masks, photo, sharpness=1):
    """The mean over the patches of each person: features (B,C,h,w), masks (n,h,w), photo (n,) ->
    (n,C).

    Patches are weighted at random. An LLM may attend to any of them, for example to those that say
    "red", so each must know the whole person: a shirt, what the legs do. sharpness: at 1 the mean
    is of many patches, at 3 one or two decide.
    """
    weights = masks * torch.empty_like(masks).exponential_() ** sharpness
    weights = weights / weights.sum((1, 2), keepdim=True).clamp(min=1e-6)
    of_person = features[photo.to(features.device)]                          # (n,C,h,w)
    return torch.einsum("nchw,nhw->nc", of_person, weights.to(features))


def mean_of_photos(values, photo):
    """The mean over photographs of the mean over their people: values (n,), photo (n,) -> scalar.

    Who is alone in a photograph counts as much as a whole group.
    """
    photo = photo.to(values.device)
    counts = torch.bincount(photo)                                           # (B,)
    return (values / counts[photo]).sum() / len(counts)


def flip_photos(pixels, poses, keypoints):
    """Mirrors photographs: pixels (B,3,H,W), poses (n,22,3,3), keypoints (m,22,2) in pixels."""
    x, y = keypoints[:, MIRROR].unbind(-1)                                   # (m,22) each
    return pixels.flip(-1), mirror(poses), torch.stack([pixels.size(-1) - x, y], -1)


def random_affine(n):
    """n zooms and shifts (n,2,3): affine maps from places in the new picture to the old one, both
    in -1..1.

    Without them the pose ViT overfits: 135 mm on the photographs it was trained on, 164 on others.
    """
    zoom = 0.95 + 0.25 * torch.rand(n, 1, 1)
    shift = 0.2 * torch.rand(n, 2, 1) - 0.1
    return torch.cat([zoom * torch.eye(2), shift], 2)


def move_pixels(pixels, affine):
    """Zooms and shifts pictures or masks (n,C,H,W)."""
    grid = F.affine_grid(affine, pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def move_keypoints(keypoints, affine, size):
    """Moves keypoints (n,22,2) as `move_pixels` does. size (2,): pixels, width and height."""
    zoom = affine[:, :1, :1]
    shift = affine[:, :, 2]
    # the map says where each new pixel comes from, so keypoints take the inverse
    places = 2 * keypoints / size - 1                                        # (n,22,2) in -1..1
    places = (places - shift[:, None]) / zoom
    return (places + 1) * size / 2


def random_exposure(pixels):
    """Recolours photographs (B,3,H,W)."""
    gain = 0.8 + 0.4 * torch.rand(len(pixels), 3, 1, 1)
    bias = 0.2 * torch.randn(len(pixels), 3, 1, 1)
    return pixels * gain + bias


def pose_vit_loss(model, heads, body, batch):
    """Loss of the pose ViT on a PhotoBatch -> (loss, mean error of the 3D joints in millimetres).
    """
    pixels = model.vision.pose_pixels(batch.pictures)                        # (B,3,H,W)
    high, wide = model.vision.pose_size
    patch_size = model.config["pose_vit"]["patch_size"][0]
    h, w = high // patch_size, wide // patch_size

    # a ViT that is higher than wide sees the middle columns
    margin = (high - wide) / 2
    keypoints = batch.keypoints - torch.tensor([margin, 0])
    boxes = batch.boxes - torch.tensor([margin, 0, 0, 0])
    masks = patch_masks(boxes, patch_size, (h, w))                           # (n,h,w)
    poses = batch.poses

    # half of the batches are mirrored
    if torch.rand(()) < 0.5:
        pixels, poses, keypoints = flip_photos(pixels, poses, keypoints)
        masks = masks.flip(-1)

    affine = random_affine(len(pixels))                                      # (B,2,3)
    pixels = random_exposure(move_pixels(pixels, affine))
    masks = move_pixels(masks[:, None], affine[batch.photo])[:, 0]           # (n,h,w)
    m = len(keypoints)
    keypoints = move_keypoints(keypoints, affine[:m], torch.tensor([wide, high]))
    features = model.vision.pose_map(pixels.to(model.device))                # (B,C,h,w)

    # 2D, of the people alone: for each joint a classification over patches
    heat = heads.keypoints(features[:m].flatten(2).mT)                       # (m,h*w,22)
    column, row = (keypoints / patch_size).long().unbind(-1)
    cells = row.clamp(0, h - 1) * w + column.clamp(0, w - 1)                 # (m,22)
    heat_loss = F.cross_entropy(heat, cells.to(heat.device))

    # 3D: joints in metres and 6D rotations
    people = person_features(features, masks, batch.photo)                   # (n,C)
    pred = heads.body(people).float()                                        # (n,198)
    joints, sixd = pred.split([22 * 3, 22 * 6], -1)
    distances = (joints.view(-1, 22, 3) - body.joints(poses).to(joints)).norm(dim=-1)
    rotations = (sixd.view(-1, 22, 6) - matrix_to_sixd(poses).to(sixd)).abs()
    distance = mean_of_photos(distances.mean(1), batch.photo)
    rotation = mean_of_photos(rotations.mean((1, 2)), batch.photo)
    return heat_loss + 5 * distance + rotation, 1000 * distance.detach()


def clip_loss(model, heads, batch):
    """Contrastive loss of CLIP: the n people of a PhotoBatch against their coarse captions."""
    pixels = model.vision.clip_pixels(batch.pictures).to(model.device)       # (B,3,S,S)
    states = model.vision.clip(pixels, output_hidden_states=True).hidden_states
    grid = (model.vision.grid, model.vision.grid)
    features = states[-2][:, 1:].mT.unflatten(2, grid)                       # (B,C,h,w)
    masks = patch_masks(batch.boxes, model.config["clip"]["patch_size"], grid)
    # by itself, a patch tells the shirt in 87 % of cases; trained by the mean of many, in 45 %
    people = person_features(features, masks, batch.photo, sharpness=3)      # (n,C)
    image = F.normalize(heads.picture(people), dim=-1)                       # (n,64)

    ids, mask = tokenize_texts(model.text_tokenizer, batch.captions)         # (n,T) each
    ids = ids.to(model.device)
    mask = mask.to(model.device)
    text = (heads.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    text = F.normalize(text, dim=-1)                                         # (n,64)

    # several people of a batch may have the same caption: they share the target
    same = (ids[:, None] == ids).all(-1).float()                             # (n,n)
    target = same / same.sum(1, keepdim=True)
    similarity = heads.scale * image.float() @ text.float().T                # (n,n)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def backbones(model, retrieval_model, cache, config):
    """Small stand-ins for CLIP and the pose ViT, trained on the same batches; they share no weight.

    People are alone at first. In the second half of the steps every other photograph shows a group,
    if there are people enough: the one run with groups from the start learned neither well. Boxes
    tell the people of a group apart, here only: later the LLM has to find the one that it is asked
    about. The third download, the LLM, has no stand-in: a small one learns to speak in `align`.
    Training it on captions alone beforehand gained nothing.
    """
    body = load_body(config.body)
    heads = BackboneHeads(model).to(model.device)
    steps, _, _ = schedule_of(config)
    if cache.world.n_groups:
        cache.group_photos  # now, not in the middle of the run

    def batch_loss(rows, step):
        alone = [sample_index(cache.n_photos, k, config.seed) for k in rows]
        in_groups = []
        if cache.world.n_groups and step >= steps / 2:
            in_groups = alone[1::2]
            alone = alone[::2]
        batch = photo_batch(cache, alone, in_groups)
        pose_loss, millimetres = pose_vit_loss(model, heads, body, batch)
        match = clip_loss(model, heads, batch)
        logs = {"joints_mm": millimetres, "match": match.detach(), "terms": len(rows)}
        return pose_loss + match, logs

    return StageRun({"model": model, "heads": heads}, batch_loss)


def tokenizer(model, retrieval_model, cache, config):
    """The VQ-VAE: reconstruction of poses, measured on the posed body (paper eq. 7).

    Half of the poses face front, half are in the camera's frame. Embedded sizes pose an
    area-weighted subset of the vertices, `paper` poses all.
    """
    real = cache.real_data.get("tokenizer")
    poses = torch.cat([cache.world.poses, cache.world.camera_poses])         # (2n,22,3,3)
    body = load_body(config.body).to(model.device)
    vertex_ids = None if config.size == "paper" else sample_vertices(body)

    def sample_poses(rows):
        if real:
            return torch.tensor(np.stack([real.draw(k)[0]["pose"] for k in rows]))
        return poses[[sample_index(len(poses), k, config.seed) for k in rows]]

    def batch_loss(rows, step):
        generator = torch.Generator().manual_seed(step_seed(config, step))
        target = sample_poses(rows).to(model.device)                         # (B,22,3,3)
        noisy, target = augment(
            target, generator, config.root_noise, config.part_noise, noise_progress(config, step))
        loss, logs = tokenizer_loss(
            model.pose_tokenizer, target, body, vertex_ids, noisy, generator)
        return loss, {**logs, "terms": len(rows)}

    return StageRun({"model": model}, batch_loss)


def noise_progress(config, step):
    """How far part noise has grown, from 0 to 1.

    The paper's grows for NOISE_STEPS iterations, however long the run is; elsewhere over the run.
    """
    steps, _, _ = schedule_of(config)
    return step / (NOISE_STEPS if config.size == "paper" else steps)


def retrieval(model, retrieval_model, cache, config):
    """Contrastive: poses against captions, and pairs of poses against their differences."""
    world = cache.world
    real = cache.real_data.get("retrieval")

    def real_examples(rows):
        poses, captions = zip(*[real.example(k, "pose2text")[1] for k in rows])
        starts, ends, changes = zip(*[real.example(k, "posediff")[1] for k in rows])
        pairs = torch.stack([torch.stack(starts), torch.stack(ends)], 1)
        return torch.stack(poses), captions, pairs, changes

    def synthetic_examples(rows):
        people = [sample_index(len(world.poses), k, config.seed) for k in rows]
        captions = []
        changes = []
        for k, i in zip(rows, people):
            rng = np.random.default_rng((config.seed, k))
            captions.append(world.caption(i, rng))
            changes.append(world.difference(i, rng))
        poses = world.poses[people]
        partners = world.poses[[i ^ 1 for i in people]]
        return poses, captions, torch.stack([poses, partners], 1), changes

    def contrast(poses, texts):
        ids, mask = tokenize_texts(model.text_tokenizer, texts)
        device = model.device
        return retrieval_model(poses.to(device), ids.to(device), mask.to(device))

    def batch_loss(rows, step):
        examples = real_examples(rows) if real else synthetic_examples(rows)
        poses, captions, pairs, changes = examples   # (B,22,3,3), B texts, (B,2,22,3,3), B texts
        pose_loss, pose_logs = contrast(poses, captions)
        pair_loss, pair_logs = contrast(pairs, changes)
        logs = {"top1": pose_logs["top1"], "pair_top1": pair_logs["top1"], "terms": len(rows)}
        return pose_loss + pair_loss, logs

    return StageRun({"retrieval": retrieval_model}, batch_loss)


def init_code_embeddings(model):
    """Starts each pose code's embedding from its codebook vector, randomly projected to width D.

    Similar poses then begin with similar embeddings. For the embedded sizes; not in the paper.
    """
    vocab = model.vocab
    table = model.llm.model.embed_tokens.weight                              # (vocabulary,D)
    D = table.size(1)
    vectors = model.pose_tokenizer.state_dict()["quantizer.codebook"]        # (K,C)
    vectors = (vectors - vectors.mean(0)) / vectors.std(0)
    C = vectors.size(1)
    projection = torch.randn(C, D) / C ** 0.5
    with torch.no_grad():
        table[vocab.pose0:vocab.p_open] = 0.3 * vectors @ projection.to(vectors)
        table[vocab.query0:] = 0.3 * torch.randn(vocab.n_tokens, D)


def init_projector_scale(model, features):
    """Folds a standardisation of the features (n,P,Dv) into the projector's first layer.

    Channels of the small CLIP are ten times as large as those of the pose ViT, and would drown
    them. For the embedded sizes; not in the paper.
    """
    first = model.projector if isinstance(model.projector, nn.Linear) else model.projector[0]
    rows = features[:1000].to(first.weight).flatten(0, 1)                    # (n*P,Dv)
    with torch.no_grad():
        first.weight /= rows.std(0) + 1e-3
        first.bias -= first.weight @ rows.mean(0)


MEGABATCH = 8  # batches of `language` whose rows are sorted by length together


def cut_by_length(rows, batch, rng):
    """The rows of MEGABATCH steps, shortest first -> the same rows, batch by batch.

    A batch is half short rows and half long ones, each of similar length, so that its parts hold
    little padding. Batches of one length each would save as much, but learn worse: the held-out
    loss of align after 1,200 steps is 1.728 and 1.641 then (seeds 0 and 1), 1.723 and 1.631 with
    halves, 1.719 and 1.632 with unsorted batches.
    """
    short = batch // 2
    long = batch - short
    n_short = MEGABATCH * short
    mixed = []
    for i, j in zip(rng.permutation(MEGABATCH), rng.permutation(MEGABATCH)):
        mixed += rows[i * short:(i + 1) * short]
        mixed += rows[n_short + j * long:n_short + (j + 1) * long]
    return mixed


def tasks_of(config, stage):
    """The tasks that a stage learns: of those in STAGES what the model can answer, and --tasks."""
    tasks = answerable(STAGES[stage].tasks, config.pose_head or "codes")
    if config.tasks:
        tasks = [task for task in tasks if task in config.tasks.split(",")]
    return tasks


def language(model, retrieval_model, cache, config):
    """align to reason: cross-entropy of words and codes, over a mixture of tasks.

    The rows of a part of a batch are padded to the longest; see `cut_by_length`.

    A model without codes learns rotations beside the words, and no task that shows it a pose.
    """
    stage = STAGES[config.stage]
    tasks = tasks_of(config, config.stage)
    real = cache.real_data.get(config.stage)
    steps, batch, _ = schedule_of(config)
    n_who = 0
    if config.stage == "reason" and "reason_text" in tasks:
        n_who = int(SHARE_OF_WHO_FIRST * steps) * batch
    mixture = real or Mixture(
        tasks, config.seed, cache.world, cache, stage.n_templates, cache.n_photos,
        model.has_codes, n_who)
    if not real:
        cache.compute(tasks)  # now: later the model is in training mode
    body = load_body(config.body).to(model.device)
    if config.compile:
        model.llm.model.compile(dynamic=True)  # in place: parameters keep their names
    size = MEGABATCH * batch

    def encode(samples):
        """The rows of some samples, the shortest first."""
        examples = [mixture[k] for k in samples]
        rows = model.encode_all([segments for _, segments in examples])
        return sorted(rows, key=lambda row: len(row.ids))

    @lru_cache(1)
    def megabatch(i):
        """The rows of samples i * size to (i + 1) * size, batch by batch."""
        rng = np.random.default_rng((config.seed, i))
        return cut_by_length(encode(range(i * size, (i + 1) * size)), batch, rng)

    def rows_of(samples):
        if real:  # a megabatch would have every process open the pictures of all others
            return encode(samples)
        return [megabatch(k // size)[k % size] for k in samples]

    def batch_loss(rows, step):
        return model(collate(rows), body, config.joint_weight)

    return StageRun({"model": model}, batch_loss, rows_of)


DRAWS = 32  # poses that a prompt gets in `reward`
JOINT_PENALTY = 2  # of a metre; 1 is what all that a text says is worth
IMITATION = 0.02  # weight of cross-entropy


class Trial(NamedTuple):
    """A prompt of `reward`."""

    row: Row
    text: str
    source: torch.Tensor  # the pose (22,3,3) that the text changes, or None
    chances: torch.Tensor  # (N,D) from 0 to 1: where in its distribution each code is drawn


def draw_codes(logits, chances):
    """Logits (n,N,K), chances (n,N,D) -> D codes for each token (n,N,D), drawn by their softmax."""
    cdf = logits.softmax(-1).cumsum(-1)                                      # (n,N,K)
    return torch.searchsorted(cdf, chances * cdf[..., -1:], right=True)      # (n,N,D)


def reward(model, retrieval_model, cache, config):
    """Policy gradients: drawn poses that do as the text says become likelier, others less likely.

    Codes that differ from the target's are wrong for cross-entropy, whatever pose they stand for.
    Here a pose costs what can be checked of it: the share of what the text says that it breaks,
    and JOINT_PENALTY for each metre between its joints and the target's, because a pose that
    satisfies a text may forget what the text does not speak of. The baseline is the mean over the
    DRAWS poses of a prompt; all codes come from one step, so these cost no further step of the LLM.

    Source: REINFORCE (Williams 1992) with the baseline of GRPO; for poses Pose-RFT (ICLR 2026).
    """
    stage = STAGES[config.stage]
    tasks = tasks_of(config, config.stage)
    mixture = cache.real_data.get(config.stage)
    if not mixture:
        mixture = Mixture(tasks, config.seed, cache.world, cache, stage.n_templates)
        cache.compute(tasks)  # now: later the model is in training mode
    body = load_body(config.body).to(model.device)

    def trials(samples):
        """The prompts of some samples, each with random numbers of its own."""
        prompts = [mixture[k][1] for k in samples]
        found = []
        for k, prompt, row in zip(samples, prompts, model.encode_all(prompts)):
            rng = np.random.default_rng((config.seed, k, 2))
            chances = torch.tensor(rng.random((model.vocab.n_tokens, DRAWS), np.float32))
            found.append(Trial(row, *demand_of(model, prompt), chances))
        return found

    def batch_loss(rows, step):
        batch = model.to_device(collate([trial.row for trial in rows]))
        _, logits, labels = model.predict(batch)
        imitation, logs = model.token_loss(logits, labels)

        # 1) draw poses
        logits, codes = model.at_queries(batch, logits, labels)              # (n,N,K), (n,N)
        chances = torch.stack([trial.chances for trial in rows]).to(logits)  # (n,N,D)
        draws = draw_codes(logits.detach(), chances)                         # (n,N,D)
        poses = model.pose_tokenizer.decode(draws.mT.flatten(0, 1))          # (n*D,22,3,3)
        poses = poses.unflatten(0, (-1, DRAWS))                              # (n,D,22,3,3)

        # 2) what they cost
        target = body.joints(model.pose_tokenizer.decode(codes))             # (n,22,3)
        distance = body.joints(poses) - target[:, None]                      # (n,D,22,3)
        metres = distance.norm(dim=-1).mean(-1)                              # (n,D)
        shares = []
        for trial, drawn in zip(rows, poses.cpu()):
            shares.append(share_shown(trial.text, drawn, trial.source))
        true = torch.tensor(np.stack(shares)).to(metres)                     # (n,D)
        cost = 1 - true + JOINT_PENALTY * metres                             # (n,D)

        # 3) the gradient of the cost that is to be expected
        chosen = logits.log_softmax(-1).gather(2, draws).sum(1)              # (n,D)
        policy = ((cost - cost.mean(1, keepdim=True)) * chosen).mean()
        loss = cost.mean() + policy - policy.detach()  # worth reading: the value is the cost
        logs |= {"true": true.mean(), "joints_mm": 1000 * metres.mean()}
        return loss + IMITATION * imitation, logs

    return StageRun({"model": model}, batch_loss, trials)


# stage -> function of (model, retrieval model, cache, config) that returns its StageRun
STAGE_RUNS = {
    "backbones": backbones, "tokenizer": tokenizer, "retrieval": retrieval,
    "align": language, "project": language, "instruct": language, "reason": language,
    "reward": reward,
}


# ---- 5. The loop ---------------------------------------------------------------------------------
def schedule_of(config):
    """(steps, batch, peak learning rate) of the stage at this size; flags take precedence."""
    steps, batch, lr = STAGES[config.stage].schedule[column(config.size)]
    return config.steps or steps, config.batch or batch, config.lr or lr


def lr_at(step, steps, peak):
    """Linear warm-up over 3 % of the run, then a cosine down to zero (paper Table 3)."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def prepare_lora(config, model):
    """Gives the LLM adapters of rank --lora_r, in place, before a stage that trains it by LoRA.

    Adapters of another rank, or on other projections, are folded into the weights that they adapt.
    """
    rank = model.config["lora_r"] if model.config["lora"] else 0
    stays = rank == config.lora_r and model.config["lora_on"] == config.lora_on
    if stays or not adapts_llm(config.stage, config.size):
        return
    if rank:
        merge_lora(model.llm.model.layers)
        model.config["lora"] = False

    model.config["lora_r"] = config.lora_r
    model.config["lora_on"] = config.lora_on
    if config.lora_r:
        torch.manual_seed(config.seed)  # a stage must not depend on what ran before it
        model.grow_lora()


def freeze(config, modules):
    """Freezes all parameters but those of the stage -> {name: parameter that learns}."""
    pattern = trainable(config.stage, config.size, config.lora_r)
    learning = {}
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            if module_name != "model":
                name = f"{module_name}.{name}"
            learns = module_name == "heads" or re.match(pattern, name) is not None
            parameter.requires_grad_(learns)
            if learns:
                learning[name] = parameter
    return learning


def process_rank():
    """The number of this process, as torchrun says."""
    return int(os.environ.get("RANK", 0))


def process_count():
    """How many processes train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Is this the process that prints and writes?"""
    return process_rank() == 0


def parts_of(config, batch):
    """How many parts a batch is split into: --accumulate, or 2 of sequences, short and long ones.
    """
    if config.accumulate:
        return config.accumulate
    reads_sequences = STAGE_RUNS[config.stage] is language
    return 2 if reads_sequences and batch % (2 * process_count()) == 0 else 1


def split_batch(run, step, batch, config):
    """This process's share of the rows of a step, in parts of similar rows."""
    rank = process_rank()
    count = process_count()
    if STAGES[config.stage].needs_full_batch:  # the first process trains it alone
        rank = 0
        count = 1
    rows = run.rows(range(step * batch + rank, (step + 1) * batch, count))
    size = len(rows) // parts_of(config, batch)
    return [rows[start:start + size] for start in range(0, len(rows), size)]


def compute_gradient(run, learning, step, batch, config):
    """Fills .grad with the gradient of the whole batch -> sums of the logs over it.

    Each part counts by its number of terms (labels, or samples) and the sum is divided once at the
    end, so that splitting a batch changes nothing. A log is a mean over the terms of a part, or a
    pair (sum, count).

    sums: name -> tensor (2,), sum and count, on the device, because each number that is read from
    a GPU waits until the GPU has caught up.
    """
    sums = {}
    for rows in split_batch(run, step, batch, config):
        with bfloat16(config):
            loss, logs = run.loss(rows, step)
        terms = logs.pop("terms")
        (loss * terms).backward()

        for name, value in {"loss": loss.detach(), **logs}.items():
            if isinstance(value, tuple):
                pair = torch.stack(value)
            else:
                pair = terms * torch.stack([value, torch.ones_like(value)])
            sums[name] = sums.get(name, 0) + pair

    for parameter in learning.values():
        if parameter.grad is None:  # a part without images gives the projector no gradient
            parameter.grad = torch.zeros_like(parameter)
    if process_count() > 1 and not STAGES[config.stage].needs_full_batch:
        all_reduce(sums, learning)
    terms = sums["loss"][1]  # of the whole batch
    for parameter in learning.values():
        parameter.grad /= terms
    return sums


def all_reduce(sums, learning):
    """Adds up the sums of the logs and the gradients of all processes, in place."""
    pairs = torch.stack(list(sums.values()))
    torch.distributed.all_reduce(pairs)
    sums.update(zip(sums, pairs))
    for parameter in learning.values():
        torch.distributed.all_reduce(parameter.grad)


def bfloat16(config):
    """Autocast to bfloat16 on a GPU; float32 on a CPU, which gains nothing from bfloat16.

    The tokenizer stays in float32 because rounding would move its codes, the retrieval model
    because a metric should not depend on the machine.
    """
    on_gpu = config.device.startswith("cuda")
    if on_gpu and config.stage not in ("tokenizer", "retrieval"):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def make_optimisers(config, learning, peak):
    """AdamW (paper); at the embedded sizes Muon for the weight matrices of transformer layers.

    Muon orthogonalises the update, so that weak directions of a matrix move as far as strong ones:
    the same examples teach more (see the model card). LoRA matrices stay with AdamW. Source: Jordan
    et al. 2024, https://kellerjordan.github.io/posts/muon; steps scaled as in Liu et al. 2025.
    """
    matrices = []
    others = []
    for name, parameter in learning.items():
        in_layer = ".layer" in name and parameter.dim() == 2
        is_lora = name.endswith((".A", ".B"))
        if config.size != "paper" and in_layer and not is_lora:
            matrices.append(parameter)
        else:
            others.append(parameter)

    adamw = torch.optim.AdamW(others, peak, betas=(0.9, 0.99), weight_decay=0.0)
    return [adamw, Muon(matrices, peak)] if matrices else [adamw]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (Jordan et al. 2024).

    The numbers of torch.optim.Muon (no weight decay, steps scaled to those of AdamW) in half of the
    time, because matrices of equal shape are one batch.
    """

    def __init__(self, matrices, lr):
        groups = {}
        for matrix in matrices:
            group = groups.setdefault(matrix.shape, {"params": []})
            group["params"].append(matrix)
        super().__init__(groups.values(), {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = []
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"]
                average.lerp_(matrix.grad, 1 - group["momentum"])
                updates.append(matrix.grad.lerp(average, group["momentum"]))

            # as large as a step of AdamW (Liu et al. 2025)
            scale = 0.2 * max(matrix.shape) ** 0.5
            updates = orthogonalise(torch.stack(updates))                    # (n,h,w)
            for matrix, update in zip(group["params"], updates):
                matrix.add_(update, alpha=-scale * group["lr"])


def orthogonalise(matrices):
    """(n,h,w) -> (n,h,w): the same singular vectors, all singular values about 1.

    Five steps of a Newton-Schulz iteration, with the coefficients of Jordan et al. 2024. They bear
    bfloat16, which a GPU is fastest with; a CPU that lacks it would take 20 times as long.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT                                                      # (n,h,h)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)                     # (n,h,w)
    return x.mT if is_tall else x


def fit(run, config, out):
    """The training loop -> seconds that the stage took, including those before a resume."""
    steps, batch, peak = schedule_of(config)
    learning = freeze(config, run.modules)
    if "model" in run.modules:  # half of the memory where it counts; what learns is float32
        cast_frozen(run.modules["model"], default_dtype(config.size, config.device))
    optimisers = make_optimisers(config, learning, peak)
    start = 0
    seconds_before = 0.0
    if config.resume:
        start, seconds_before = load_state(run, learning, optimisers, config, out)
    print_learning(run, learning, config)

    began = time.perf_counter()
    recent = []  # logs of the steps since the last line of the log
    for step in range(start, steps):
        # 1) random numbers (dropout) and the learning rate are functions of the step
        torch.manual_seed(step_seed(config, step))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr_at(step, steps, peak)

        # 2) the gradient, clipped as in the official scripts. Only the backbones are not clipped:
        #    a common norm would make each of the two depend on the other's loss
        sums = compute_gradient(run, learning, step, batch, config)
        max_norm = math.inf if config.stage == "backbones" else 1.0
        norm = torch.nn.utils.clip_grad_norm_(learning.values(), max_norm)
        logs = read_logs(sums, norm)
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the loss of {config.stage} became {logs['loss']} at step {step}; "
                f"lower --lr (now {peak:g}) and start the stage again")

        # 3) the update
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        # 4) a line of the log, about a hundred in a stage
        recent.append(logs)
        seconds = time.perf_counter() - began
        is_last = step + 1 == steps
        if (step + 1) % max(10, steps // 100) == 0 or is_last:
            means = mean_of_rows(recent)
            per_step = seconds / (step - start + 1)
            log_step(out, {
                "stage": config.stage, "step": step + 1, "of": steps,
                **means, "lr": lr_at(step, steps, peak),
                "ms": 1000 * per_step, "terms_per_s": means["terms"] / per_step,
                "eta_s": per_step * (steps - step - 1)})
            recent.clear()

        # 5) a state to resume from
        if (step + 1) % config.save_every == 0 and not is_last:
            save_state(
                run, learning, optimisers, config, out, step + 1, seconds_before + seconds)
    return seconds_before + time.perf_counter() - began


# ---- 6. The log ----------------------------------------------------------------------------------
def read_logs(sums, norm):
    """Sums of `compute_gradient`, norm of the gradient -> {name: number}, the logs of a step.

    The only copy of a step from the device.
    """
    norm_pair = torch.stack([norm, torch.ones_like(norm)])
    pairs = torch.stack([*sums.values(), norm_pair]).tolist()

    logs = {}
    for name, (total, count) in zip([*sums, "grad"], pairs):
        if count:  # a batch without poses has no pose_acc
            logs[name] = total / count
        if name == "loss":
            logs["terms"] = count
    return logs


def print_learning(run, learning, config):
    """Prints how many parameters of each part learn: a wrong freeze shows here."""
    if not is_first():
        return
    total = Counter()
    training = Counter()
    for module_name, module in run.modules.items():
        for name, parameter in module.named_parameters():
            part = ".".join(name.split(".")[:2]) if module_name == "model" else module_name
            total[part] += parameter.numel()
            if parameter.requires_grad:
                training[part] += parameter.numel()

    print(f"\n{config.stage}: {training.total():,} parameters learn", flush=True)
    for part, count in training.items():
        print(f"    {part:<28}{count:>12,} of {total[part]:,}")


def mean_of_rows(rows):
    """Dicts of numbers -> {key: mean over the rows that have it}."""
    values = {}
    for row in rows:
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    return {key: float(np.mean(numbers)) for key, numbers in values.items()}


# keys of a row that are printed in a format of their own, or not at all
NOT_SHOWN = ("stage", "step", "of", "terms", "ms", "terms_per_s", "eta_s")


def log_step(out, row):
    """Appends a row to log.jsonl and prints it, in the first process only."""
    if not is_first():
        return
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")

    figures = [f"{key} {value:.3g}" for key, value in row.items() if key not in NOT_SHOWN]
    minutes, seconds = divmod(round(row["eta_s"]), 60)
    print(f"{row['stage']:<9} {row['step']:>6}/{row['of']} | {' | '.join(figures)} | "
          f"{row['ms']:.0f} ms | {row['terms_per_s']:.0f} terms/s | "
          f"{minutes}:{seconds:02d} left", flush=True)


def prepare_log(out, init, is_fresh):
    """Deletes the log of an older model in a fresh run; otherwise ends a line that was cut off.

    A branch goes on with the log of the model in the folder `init` that it starts from.
    """
    path = out / "log.jsonl"
    if is_fresh:
        path.unlink(missing_ok=True)
        if init:
            copy_history(init, out)
    elif path.exists() and not path.read_bytes().endswith(b"\n"):
        with open(path, "a") as file:
            file.write("\n")


def parse_row(line):
    """A line of the log -> row; None for a line that a killed run has not completed."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_row = isinstance(row, dict) and {"stage", "step", "of", "loss"} <= row.keys()
    return row if is_row else None


def read_log(out):
    """log.jsonl -> {stage: rows in the order of steps}; of steps that were repeated, the last."""
    stages = {}
    for line in (out / "log.jsonl").read_text(errors="replace").splitlines():
        row = parse_row(line)
        if not row:
            continue
        rows = stages.setdefault(row["stage"], [])
        while rows and (rows[-1]["step"] >= row["step"] or rows[-1]["of"] != row["of"]):
            rows.pop()  # of a run that was resumed before this step, or of an older one
        rows.append(row)
    return stages


def draw_axes(draw, frame, steps, low, high):
    """A frame (left, top, right, bottom) whose ticks tell steps to the right and losses upwards."""
    left, top, right, bottom = frame
    draw.rectangle(frame, outline="black")
    for k in range(5):
        x = left + k * (right - left) / 4
        y = bottom - k * (bottom - top) / 4
        draw.line((x, bottom, x, bottom + 4), fill="black")
        draw.line((left - 4, y, left, y), fill="black")
        loss = low * (high / low) ** (k / 4)  # the scale is logarithmic
        draw.text((left - 7, y), f"{loss:.3g}", fill="black", anchor="rm")
        draw.text((x, bottom + 7), f"{steps * k / 4:.5g}", fill="black", anchor="mt")
    draw.text((right, bottom + 21), "step", fill="black", anchor="rt")
    draw.text((left - 7, bottom + 7), "loss", fill="black", anchor="rt")


def draw_curve(rows):
    """Rows of the log of a stage -> picture (CELL,CELL) of its loss, on a log scale, over steps."""
    left = 60  # room for the labels of the axes, on the left and below
    top = 12
    right = CELL - 20  # half of its tick reaches beyond it
    bottom = CELL - 36
    losses = [max(row["loss"], 1e-6) for row in rows]
    low = min(losses)
    high = max(losses)
    log_range = max(math.log(high / low), 1e-9)
    points = []
    for row, loss in zip(rows, losses):
        x = left + (right - left) * row["step"] / row["of"]
        y = bottom - (bottom - top) * math.log(loss / low) / log_range
        points.append((x, y))

    picture = Image.new("RGB", (CELL, CELL), "white")
    draw = ImageDraw.Draw(picture)
    draw_axes(draw, (left, top, right, bottom), rows[-1]["of"], low, high)
    draw.line(points, fill=(200, 60, 40), width=2)
    return picture


def plot_losses(out):
    """log.jsonl -> loss.png: one curve a stage, three in a row."""
    cells = []
    for stage, rows in read_log(out).items():
        name = f"{stage}: loss {rows[0]['loss']:.3g} to {rows[-1]['loss']:.3g}"
        cells.append((name, draw_curve(rows)))
    rows = [("", cells[start:start + 3]) for start in range(0, len(cells), 3)]
    save_png(contact_sheet(rows), out / "loss.png")


# ---- 7. Checkpoints, and states to resume from ---------------------------------------------------
def depends_on(stage, other):
    """Does a stage build on another one, directly or through stages between them?"""
    return any(need == other or depends_on(need, other) for need in STAGES[stage].needs)


def is_outdated(stage, trained):
    """Does a stage build on one of those that are trained anew?"""
    return any(depends_on(stage, other) for other in trained)


def forget_stage(notes, stage):
    """Takes a stage that no longer stands out of the notes, in place."""
    if stage in notes["stages"]:
        notes["stages"].remove(stage)
    notes["seconds"].pop(stage, None)
    notes["commands"].pop(stage, None)
    notes["commits"].pop(stage, None)


def save_checkpoint(config, model, retrieval_model, notes, out, seconds):
    """Writes the checkpoint after a stage, with notes on how it was made, and loss.png."""
    # a stage that builds on the one just trained is outdated
    for stage in list(notes["stages"]):
        if depends_on(stage, config.stage):
            forget_stage(notes, stage)
    forget_stage(notes, config.stage)
    notes["stages"].append(config.stage)
    notes["seconds"][config.stage] = round(seconds)
    notes["commands"][config.stage] = provenance()["command"]
    notes["commits"][config.stage] = git_hash()
    if config.stage in ("backbones", "tokenizer"):
        notes["body"] = pathlib.Path(config.body).name

    written = {key: notes[key] for key in ("stages", "seconds", "commands", "commits", "body")}
    extra = {}
    if "retrieval" in notes["stages"]:
        written["retrieval"] = retrieval_model.config
        for name, tensor in retrieval_model.state_dict().items():
            extra[RETRIEVAL_PREFIX + name] = tensor
    save(model, out, extra=extra, seed=config.seed, people=config.people, photos=config.photos,
         **written)
    (out / "train_state.safetensors").unlink(missing_ok=True)
    plot_losses(out)


def wait_for_first(model, out):
    """Waits until the first process has trained a stage; the others read what it trained alone."""
    torch.distributed.barrier()
    if is_first():
        return
    state = {}
    for name, tensor in read_tensors(out / "model.safetensors").items():
        if not name.startswith(RETRIEVAL_PREFIX):
            state[name] = tensor
    model.load_state_dict(state)


# settings that must be the same when a run is resumed
FIXED_SETTINGS = (
    "stage", "size", "seed", "tasks", "steps", "batch", "lr", "accumulate", "data", "people",
    "photos", "attn", "vision", "projector", "pose_head", "lora_r", "lora_on", "joint_weight",
    "body", "root_noise", "part_noise",
)


def trainable_state(run, learning):
    """name -> tensor of all that a stage changes: parameters that learn, and buffers (codebook)."""
    state = dict(learning)
    for module_name, module in run.modules.items():
        for name, buffer in module.named_buffers():
            state[f"buffer.{module_name}.{name}"] = buffer
    return state


def save_state(run, learning, optimisers, config, out, step, seconds):
    """Writes train_state.safetensors: weights, the state of the optimisers, step and settings."""
    from safetensors.torch import save_file
    if not is_first():
        return
    state = {}
    for name, tensor in trainable_state(run, learning).items():
        state[name] = tensor.detach().cpu().contiguous().clone()
    for name, parameter in learning.items():
        for optimiser in optimisers:
            for kind, value in optimiser.state.get(parameter, {}).items():
                state[f"memory.{kind}.{name}"] = value.cpu().contiguous()

    facts = {key: getattr(config, key) for key in FIXED_SETTINGS}
    facts |= {"step": step, "seconds": seconds}
    with atomic_write(out / "train_state.safetensors") as path:
        save_file(state, path, metadata={"run": json.dumps(facts)})


def read_state(out):
    """Settings, "step" and "seconds" of train_state.safetensors; {} if there is none.

    Raises UserError if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open
    path = out / "train_state.safetensors"
    if not path.exists():
        return {}
    try:
        with safe_open(str(path), "pt") as file:
            facts = json.loads(file.metadata()["run"])
        return {key: facts[key] for key in (*FIXED_SETTINGS, "step", "seconds")}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is not a complete training state; delete it to begin its stage again"
        ) from None


def load_state(run, learning, optimisers, config, out):
    """Restores train_state.safetensors -> (next step, seconds so far); (0, 0) for another stage."""
    path = out / "train_state.safetensors"
    facts = read_state(out)
    if facts.get("stage") != config.stage:
        return 0, 0.0
    changed = []
    for key in FIXED_SETTINGS:
        now = getattr(config, key)
        if facts[key] != now:
            changed.append(f"--{key} {facts[key]} (now {now})")
    if changed:
        raise UserError(
            f"{path} was made with {', '.join(changed)}; give the same flags, or another --out")

    state = read_tensors(path)
    with torch.no_grad():
        for name, tensor in trainable_state(run, learning).items():
            if name not in state or state[name].shape != tensor.shape:
                raise UserError(
                    f"{path} belongs to another model: {name} does not fit; delete it")
            tensor.copy_(state[name])

    owner = {}  # parameter -> its optimiser
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                owner[parameter] = optimiser
    for key, value in state.items():
        if key.startswith("memory."):
            _, kind, name = key.split(".", 2)
            parameter = learning[name]
            if kind != "step":  # the optimisers count on the CPU
                value = value.to(parameter.device)
            owner[parameter].state[parameter][kind] = value
    return facts["step"], facts["seconds"]


# ---- 8. Runs -------------------------------------------------------------------------------------
MINIMUM = {
    "steps": 0, "batch": 0, "people": 0, "photos": 0, "lr": 0, "accumulate": 0, "lora_r": -1,
    "save_every": 1, "threads": 0, "joint_weight": 0,
}


def validate(config):
    """Checks all settings before anything is computed. Raises UserError."""
    validate_stages(config)
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if value and value not in choices:
            raise UserError(f"--{name} {value} is not one of {', '.join(choices)}")
    validate_tasks(config)
    for name, minimum in MINIMUM.items():
        value = getattr(config, name)
        if not minimum <= value < 1e9:  # NaN is refused, too
            raise UserError(f"--{name} {value} must be at least {minimum} and below 1e9")

    if config.joint_weight and not draws_poses(config):
        raise UserError(
            f"--joint_weight {config.joint_weight} is about poses at their queries, which a model "
            "of --pose_head codes and --attn mixed has; leave it out")
    if bool(config.llm) != bool(config.pose_vit):
        raise UserError("--llm and --pose_vit must come together: give both, or neither")
    if config.clip and not config.llm:
        raise UserError("--clip needs --llm and --pose_vit")

    people = config.people or N_PEOPLE[column(config.size)][0]
    if people % 2 == 1 or config.photos % 2 == 1:
        raise UserError("--people and --photos must be even, because people come in pairs")
    if people < POOL and "reason" in stages_to_run(config):
        raise UserError(
            f"--people {people} is too few for the groups of --stage reason; give {POOL} or more")
    compiler = os.environ.get("CXX", "g++")  # as torch looks for it
    if config.compile and not shutil.which(compiler):
        raise UserError(
            f"--compile needs a C++ compiler, and there is no {compiler}; "
            "install one, or leave --compile out")
    if config.photos > people:
        raise UserError(f"--photos {config.photos} is more than --people {people}")


def validate_stages(config):
    """Checks that the stages exist at this size and that their batches can be split."""
    if config.size not in SIZES:
        raise UserError(f"--size {config.size} is not one of {', '.join(SIZES)}")
    for stage in config.stage.split(","):
        if config.stage != "all" and stage not in STAGES:
            raise UserError(f"--stage {stage} is not one of {', '.join(STAGES)}, all")

    for stage in stages_to_run(config):
        row = STAGES[stage]
        if stage == "tokenizer" and config.pose_head in WITHOUT_CODES:
            raise UserError(
                f"--pose_head {config.pose_head} has no codes, so there is no tokenizer to train; "
                "leave tokenizer out of --stage")
        if stage == "reward" and not draws_poses(config):
            raise UserError(
                "--stage reward draws poses at their queries, which a model of --pose_head codes "
                "and --attn mixed has; leave reward out of --stage")
        if column(config.size) not in row.schedule:
            raise UserError(
                f"--size {config.size} has no stage {stage}; give --llm and --pose_vit instead")
        if row.needs_full_batch and config.accumulate > 1:
            raise UserError(
                f"the loss of {stage} needs the whole batch at once; leave --accumulate out")
        batch = config.batch or row.schedule[column(config.size)][1]
        parts = 1 if row.needs_full_batch else max(1, config.accumulate) * process_count()
        if batch % parts:
            raise UserError(
                f"--batch {batch} of {stage} does not cut into {parts} parts of equal size "
                "(--accumulate x processes)")


def draws_poses(config):
    """Does the model have queries, under each of which is a distribution over codes?"""
    return config.pose_head not in WITHOUT_CODES and config.attn != "causal"


def stages_to_run(config):
    """The stages that --stage names, in the order of STAGES; all: those that are not downloads."""
    if config.stage != "all":
        named = config.stage.split(",")
        return [stage for stage in STAGES if stage in named]
    stages = [stage for stage, row in STAGES.items() if column(config.size) in row.schedule]
    if config.pose_head in WITHOUT_CODES:
        stages.remove("tokenizer")
    if not draws_poses(config):
        stages.remove("reward")
    if config.llm and "backbones" in stages:
        stages.remove("backbones")
    return stages


def fill_defaults(config):
    """Replaces empty settings by what they stand for, in place."""
    people, photos = N_PEOPLE[column(config.size)]
    config.people = config.people or people
    config.photos = config.photos or min(photos, config.people)
    if config.part_noise is None:
        config.part_noise = config.size == "paper"
    if not config.device and process_count() > 1 and torch.cuda.is_available():
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
    config.device = find_device(config.device)


def validate_tasks(config):
    """Checks that --tasks leaves a task to each stage that learns sequences. Raises UserError."""
    if not config.tasks:
        return
    for task in config.tasks.split(","):
        if task not in TASKS:
            raise UserError(f"--tasks {task} is not one of {', '.join(TASKS)}")
    for stage in stages_to_run(config):
        if STAGE_RUNS[stage] in (language, reward) and not tasks_of(config, stage):
            learned = dict.fromkeys(tasks_of(dataclasses.replace(config, tasks=""), stage))
            raise UserError(
                f"--tasks {config.tasks} leaves {stage} without a task; name one of "
                f"{', '.join(learned)}, or leave {stage} out of --stage")


def fill_system(config):
    """Replaces an empty --out by its default, and empty --pose_head and --attn by the checkpoint's.

    Which stages there are depends on them. Raises UserError.
    """
    config.out = config.out or f"out/{config.size}"
    notes = {"pose_head": "codes", "attn": "mixed"}
    for folder in (config.init, config.out):
        if folder and has_checkpoint(folder):
            notes = read_config(folder)
    config.pose_head = config.pose_head or notes["pose_head"]
    config.attn = config.attn or notes["attn"]


def read_real_data(config):
    """Reads the data sets of --data -> {stage: RealData}. Raises UserError."""
    if not config.data:
        return {}
    table = load_json(config.data)
    if not is_data_table(table):
        stages = ", ".join(stage for stage in STAGES if stage != "backbones")
        raise UserError(
            f"{config.data} must name stages ({stages}) and for each its data sets with weights "
            'above 0: {"STAGE": {"KIND:PATH": WEIGHT}}')

    real_data = {}
    for stage in stages_to_run(config):
        if stage in table:
            row = STAGES[stage]
            tasks = row.tasks
            if STAGE_RUNS[stage] in (language, reward):
                tasks = tasks_of(config, stage)
            real_data[stage] = RealData(table[stage], tasks, config.seed, row.n_templates)
    if "retrieval" in real_data:
        for task in STAGES["retrieval"].tasks:
            real_data["retrieval"].draw(0, task)  # each batch needs both: find out now
    return real_data


def is_data_table(table):
    """Is this {stage: {"KIND:PATH": weight above 0}}?"""
    if not isinstance(table, dict):
        return False
    for stage, weights in table.items():
        if stage not in STAGES or stage == "backbones":
            return False
        if not isinstance(weights, dict) or not weights:
            return False
        for weight in weights.values():
            if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                return False
    return True


def has_checkpoint(folder):
    """Is there a model in this folder?"""
    return (pathlib.Path(folder) / "model.safetensors").exists()


def validate_out(config, out):
    """Checks that nothing in --out gets lost that the user may want to keep. Raises UserError."""
    state = read_state(out)
    running = stages_to_run(config)
    if state and not config.resume:
        raise UserError(
            f"{out} holds a run of {state['stage']} that was cut off; type the same command with "
            f"--resume to go on from step {state['step']}, or give another --out")
    if state and state["stage"] not in running:
        raise UserError(
            f"{out} holds a run of {state['stage']} that was cut off at step {state['step']}; "
            f"finish it first, with --stage {state['stage']} --resume, or give another --out")

    if config.init and has_checkpoint(out) and not config.resume:
        raise UserError(
            f"--init {config.init} starts a branch, but {out} holds a model already; "
            "give another --out, or leave --init out")


def validate_later_stages(config, notes, out):
    """Checks that training outdates no later stage of the model in --out. Raises UserError."""
    remaining = remaining_stages(config, notes, out)
    lost = []
    for stage in notes["stages"]:
        if stage not in remaining and is_outdated(stage, remaining):
            lost.append(stage)
    if lost:
        raise UserError(
            f"{out} has been through {', '.join(lost)}, which a new {', '.join(remaining)} "
            f"outdates; keep it and train a branch: --init {out} and another --out")


def prepare_model(config, out, real_data):
    """Loads the checkpoint to continue, or makes a model -> (model, retrieval model, notes).

    notes: what config.json says of the stages so far. Raises UserError.
    """
    # a branch that was cut off goes on from its own checkpoint, not from --init
    is_own = has_checkpoint(out)
    folder = pathlib.Path(out if is_own or not config.init else config.init)
    if config.init or (is_own and not config.resume):
        if config.stage == "all":
            raise UserError(
                f"--stage all starts with a new model, but {folder} holds one; "
                "give --resume, or another --out")
        if config.llm:
            raise UserError(
                f"--llm begins a new model, but {folder} holds one; "
                "give another --out, or leave --llm out")

    notes = {"stages": [], "seconds": {}, "commands": {}, "commits": {}, "body": ""}
    if config.init or is_own:
        notes |= read_config(folder)
        validate_pose_head(config, notes, folder, is_own)
        validate_needs(config, notes["stages"], folder)
        validate_checkpoint(config, notes, folder)
        if is_own:
            validate_later_stages(config, notes, out)
        # what a later stage trains further is not rounded before it
        exact = f"{EXACT}|{TRAINABLE['instruct']}"
        dtype = default_dtype(config.size, config.device)
        model = load(folder, dtype=dtype, exact=exact)
        if config.pose_head != notes["pose_head"]:
            chosen = chosen_config(config)
            settings = {name: chosen[name] for name in SETTINGS_OF_HEAD}
            torch.manual_seed(config.seed)
            model = change_pose_head(model, settings, folder, dtype, exact)
            notes |= settings
            forget_stage(notes, "tokenizer")
        config.lora_on = config.lora_on or model.config["lora_on"]
        model.config["attn"] = config.attn or model.config["attn"]
        if {config.vision, config.projector} - {"", notes["vision"], notes["projector"]}:
            change_projector(config, model)
            for stage in ("project", "instruct", "reason", "reward"):
                forget_stage(notes, stage)
        retrieval_model = load_retrieval_model(folder)
    else:
        if config.llm:
            notes["stages"] = ["backbones"]
        validate_needs(config, notes["stages"], folder)
        model = new_model(config, real_data)
        config.lora_on = model.config["lora_on"]
        retrieval_model = None

    for name in ("attn", "vision", "projector", "pose_head"):
        setattr(config, name, model.config[name])
    if config.lora_r < 0:
        config.lora_r = model.config["lora_r"]
    return model, retrieval_model or new_retrieval_model(model, config), notes


# what a model of another pose head has of its own; the rest is as in the checkpoint of --init
SETTINGS_OF_HEAD = ("pose_head", "vision", "lora_on", "lora_r", "lora_alpha")


def validate_pose_head(config, notes, folder, is_own):
    """Checks that a checkpoint is of the system that is to be trained, or of none as yet.

    is_own: whether it is the one in --out. Raises UserError.
    """
    if notes["pose_head"] == config.pose_head:
        return
    learned = [stage for stage in notes["stages"] if STAGE_RUNS[stage] in (language, reward)]
    if learned:
        raise UserError(
            f"{folder} holds a model of --pose_head {notes['pose_head']}, whose "
            f"{', '.join(learned)} is of no use to one of --pose_head {config.pose_head}; start "
            "that one from a model before align, or without --init, with another --out")
    if is_own:
        raise UserError(
            f"{folder} holds a model of --pose_head {notes['pose_head']}; train one of --pose_head "
            f"{config.pose_head} as a branch: --init {folder} and another --out")


def validate_needs(config, trained, folder):
    """Checks that the stages before those of --stage were trained. Raises UserError."""
    running = stages_to_run(config)
    missing = []
    for stage in running:
        for need in STAGES[stage].needs:
            if need == "tokenizer" and config.pose_head in WITHOUT_CODES:
                continue
            if need not in running and need not in trained:
                missing.append(need)
    if not missing:
        return
    command = f"python train.py --stage all --size {config.size} --resume --out"
    remedy = f"train all stages ({command} {shlex.quote(str(folder))}), or give --init FOLDER"
    if column(config.size) not in STAGES[missing[0]].schedule:
        remedy = "give --llm and --pose_vit"
    raise UserError(
        f"--stage {config.stage} needs {', '.join(missing)}, which {folder} has not been through; "
        f"{remedy}")


def validate_checkpoint(config, notes, folder):
    """Checks that the flags fit the model of a checkpoint. Raises UserError."""
    if notes["size"] != config.size:
        raise UserError(
            f"{folder} holds a {notes['size']} model, not a {config.size} one; "
            f"give --size {notes['size']}")

    # an ablation of a trained model: no stage that stands may depend on what changes
    first_uses = {"attn": "align", "vision": "project", "projector": "project"}
    if {config.attn, notes["attn"]} == {"mixed", "mixed_image"}:  # which differ in images only
        first_uses["attn"] = "project"
    if notes["lora"]:
        first_uses["lora_r"] = "align" if adapts_llm("align", config.size) else "instruct"
        first_uses["lora_on"] = first_uses["lora_r"]
    trained_anew = stages_to_run(config)
    for name, first in first_uses.items():
        wanted = getattr(config, name)
        if wanted in ("", -1, notes[name]):
            continue
        for stage in notes["stages"]:
            uses = stage == first or depends_on(stage, first)
            if uses and stage not in trained_anew and not is_outdated(stage, trained_anew):
                raise UserError(
                    f"{folder} was made with --{name} {notes[name]}, which its {stage} depends on; "
                    f"train {first} and what follows it anew, or leave --{name} out")


def change_projector(config, model):
    """Gives a trained model the --vision and the untrained --projector of a branch, in place."""
    model.config["vision"] = config.vision or model.config["vision"]
    model.config["projector"] = config.projector or model.config["projector"]

    with torch.device("meta"):  # for its width alone
        eyes = DualVision(model.config["clip"], model.config["pose_vit"], model.config["vision"])
    model.vision.which = eyes.which
    model.vision.width = eyes.width
    torch.manual_seed(config.seed)
    llm_width = model.llm.config.hidden_size
    model.projector = make_projector(model.config["projector"], eyes.width, llm_width)


def chosen_config(config):
    """The config of a model of this --size with the ablations that the flags choose."""
    chosen = {name: getattr(config, name) for name in CHOICES if getattr(config, name)}
    return model_config(config.size, **chosen)


def new_model(config, real_data):
    """A model of random weights, or one around the backbones of --llm and --pose_vit."""
    torch.manual_seed(config.seed)
    sizes = chosen_config(config)
    if config.llm:
        dtype = default_dtype(config.size, config.device)
        return base_model(sizes, config.llm, config.clip, config.pose_vit, dtype)
    texts = []  # the vocabulary of an embedded size must contain all words of the data
    for real in real_data.values():
        texts += real.texts()
    words = vocabulary(texts)
    if config.pose_head == "text":
        words += POSE_CHARACTERS
    return UniPose(sizes, word_tokenizer(words))


def new_retrieval_model(model, config):
    """A retrieval model of random weights, the same whatever was trained before."""
    torch.manual_seed(config.seed)
    return Retrieval(len(model.text_tokenizer), d=RETRIEVAL_WIDTH[column(config.size)])


def run_stage(config, model, retrieval_model, cache, notes, out):
    """Trains one stage and writes the checkpoint."""
    prepare_lora(config, model)
    model.to(config.device)
    retrieval_model.to(config.device)
    if config.checkpointing:
        model.llm.gradient_checkpointing_enable()

    # the small networks start close to a solution; a stage that is trained again keeps its weights
    torch.manual_seed(config.seed)
    if config.size != "paper" and config.stage not in notes["stages"]:
        if config.stage == "align" and model.has_codes:
            init_code_embeddings(model)
        if config.stage == "project" and "project" not in cache.real_data:
            init_projector_scale(model, cache.features)

    run = STAGE_RUNS[config.stage](model, retrieval_model, cache, config)
    for module in run.modules.values():
        module.train()
    seconds = fit(run, config, out)
    if is_first():
        save_checkpoint(config, model, retrieval_model, notes, out, seconds)
        print(f"{config.stage} done in {seconds / 60:.1f} minutes; wrote {out}", flush=True)


def remaining_stages(config, notes, out):
    """The stages of --stage that are to be trained: with --resume, those that --out lacks."""
    stages = stages_to_run(config)
    if not config.resume or not has_checkpoint(out):
        return stages
    begun_again = read_state(out).get("stage")
    return [stage for stage in stages if stage not in notes["stages"] or stage == begun_again]


def count_unknown_words(config, model, real_data):
    """Prints how many words of the real texts the vocabulary lacks. Raises UserError above 10 %.

    A word-level model reads such a word as <unk>, and would learn to write it.
    """
    unknown_id = model.text_tokenizer.unk_token_id
    for stage, data_set in real_data.items():
        if not STAGES[stage].tasks:  # the tokenizer reads no texts
            continue
        texts = data_set.texts()
        n = 0
        n_unknown = 0
        for text in texts[::len(texts) // 5000 + 1]:  # 5,000 texts tell enough
            ids = model.text_ids(text)
            n += len(ids)
            n_unknown += ids.count(unknown_id)
        if not n_unknown:
            continue

        share = 100 * n_unknown / n
        if share > 10:
            raise UserError(
                f"the model does not know {share:.0f} % of the words that {config.data} holds for "
                f"{stage}; train a new one on them (--stage all), or give --llm")
        if is_first():
            print(f"{stage}: {share:.1f} % of the words of the real texts are unknown to the model")


@contextlib.contextmanager
def exclusive(out):
    """Makes the folder --out, which no other run may write to meanwhile. Raises UserError.

    The kernel releases the lock when a process dies. A run that wrote nothing leaves no folder.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "train.lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a run that ends removes its lock, maybe just after we opened it
            is_ours = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise UserError(f"another run of train.py writes to {out}; wait, or give another --out")
        try:
            yield
        finally:
            path.unlink()
            if is_new and not any(out.iterdir()):
                out.rmdir()


def main(argv=None):
    """Trains the stages of --stage one after the other."""
    config = cli(Config, argv)
    fill_system(config)
    validate(config)
    fill_defaults(config)
    set_threads(config.threads, SIZES[config.size])
    if process_count() > 1 and not torch.distributed.is_initialized():
        # a long timeout: the other processes wait while the first trains whole stages alone
        torch.distributed.init_process_group(timeout=datetime.timedelta(days=2))

    out = pathlib.Path(config.out)
    try:
        if is_first():
            with exclusive(out):
                validate_out(config, out)
                delete_leftovers(out, CHECKPOINT_FILES)
                train_stages(config, out)
        else:
            train_stages(config, out)
    except KeyboardInterrupt:
        if is_first():
            step = read_state(out).get("step", 0)
            print(f"\nstopped; type the same command with --resume to go on from step {step}",
                  file=sys.stderr)
        raise SystemExit(130) from None  # what a shell expects after Ctrl-C
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train_stages(config, out):
    """Reads all that a run needs, then trains and saves stage by stage."""
    load_body(config.body)  # now, so that a wrong file is refused before anything is computed
    real_data = read_real_data(config)
    model, retrieval_model, notes = prepare_model(config, out, real_data)
    count_unknown_words(config, model, real_data)
    if process_count() > 1:
        torch.distributed.barrier()  # all have read the checkpoint before one writes the next

    stages = remaining_stages(config, notes, out)
    if not stages:
        print(f"{out} has been through {config.stage} already; there is nothing to resume")
    if is_first():
        is_fresh = not config.resume and not has_checkpoint(out)
        prepare_log(out, config.init, is_fresh)

    world = World("train", config.people, model.vision.clip_size)
    cache = FeatureCache(model, world, config.photos, real_data)
    for stage in stages:
        if is_first() or not STAGES[stage].needs_full_batch:
            stage_config = dataclasses.replace(config, stage=stage)
            run_stage(stage_config, model, retrieval_model, cache, notes, out)
        if process_count() > 1:
            wait_for_first(model, out)


if __name__ == "__main__":
    run_main(main)
