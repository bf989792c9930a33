"""Six stages, one loop.

UniPose is trained in a fixed order, each stage on top of what the ones before have frozen (paper §3.3):

    backbones   small CLIP and pose ViT        stand-ins for two downloads, embedded sizes only
    tokenizer   VQ-VAE                         a pose becomes N code words                               (paper §3.1)
    retrieval   the retrieval_model of eval.py           not a part of UniPose                                     (appendix B.2)
    align       LLM                            poses and text share one vocabulary
    project     projector                      what the eyes see becomes words too
    instruct    projector and LLM (LoRA)       seven tasks, 200 phrasings each

A stage is a row of STAGES plus a function that returns its modules and its loss. The loop below knows nothing else:
sample numbers are a function of (seed, step), so a run that was cut off goes on bit by bit as if it had not been.
A step's gradient is the sum over its samples divided by their labels, however the batch is cut: into --accumulate
parts, or over the processes of torchrun.

    python train.py --stage all --size nano                     # everything, in about a minute: does it run?
    python train.py --stage all --size tiny --out out/tiny      # the model that ships as weights/tiny
    python train.py --stage align --out out/tiny --resume       # go on after a cut
    python train.py --stage all --size tiny --out out/causal --attn causal                     # an ablation (Table 7)
    torchrun --nproc_per_node=4 train.py --stage all --size tiny --out out/tiny                # four GPUs
"""
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import re
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
    N_TEMPLATES, PICTURE_SIZE, TASKS, Mixture, World, crop_picture, read_records, render_template,
    task_values, templates, vocabulary,
)
from eval import Retrieval, load_retrieval_model, tokenize_texts
from tokenizer import (
    MIRROR, UserError, atomic_write, augment, cli, face_front, load_body, load_json, matrix_to_sixd,
    mirror, run_main, sample_vertices, tokenizer_loss,
)
from unipose import (
    CHOICES, LLM_PARAMETERS, LORA_PARAMETERS, RETRIEVAL_PREFIX, SIZES, TRAINABLE, UniPose,
    base_model, collate, find_device, load, load_strictly, model_config, provenance, read_config,
    read_tensors, save, word_tokenizer,
)

# ---- 1. The stages -----------------------------------------------------------------------------------------------
IMAGE_TASKS = tuple(task for task, row in TASKS.items() if "image" in row.inputs)
POSE_TASKS = tuple(task for task in TASKS if task not in IMAGE_TASKS)


class Stage(NamedTuple):
    """One row. `needs`: the stages before it; needs_full_batch: the loss couples the samples of a batch (contrastive,
    EMA codebook), so it cannot be split; schedule: size -> (steps, batch, peak lr)."""
    tasks: tuple
    needs: tuple
    templates: int
    needs_full_batch: bool
    schedule: dict


# paper: 6, 2 and 2 epochs over 70k+93k, 50k+50k+100k and 30k samples, batches of 96, 32, 32 (Table 3 and its scripts);
# the tokenizer's 240 epochs of AMASS are about 200k steps. Backbones are downloads there.
STAGES = {
    "backbones": Stage((), (), 1, True,
                       dict(nano=(20, 8, 1e-3), tiny=(18_000, 32, 2.5e-3))),
    "tokenizer": Stage((), (), 1, True,
                       dict(nano=(30, 32, 1e-3), tiny=(4000, 128, 1e-3), paper=(200_000, 256, 2e-4))),
    "retrieval": Stage((), (), 1, True,
                       dict(nano=(20, 16, 1e-3), tiny=(1000, 64, 1e-3), paper=(25_000, 512, 2e-4))),
    # differences come twice as often: they are the hardest to learn
    "align": Stage((*POSE_TASKS, "posediff"), ("tokenizer",), 1, False,
                   dict(nano=(30, 8, 2e-3), tiny=(20_000, 8, 2e-3), paper=(10_200, 96, 1.5e-4))),
    "project": Stage(IMAGE_TASKS, ("backbones", "align"), 1, False,
                     dict(nano=(20, 8, 2e-3), tiny=(300, 16, 2e-3), paper=(12_500, 32, 5e-5))),
    # images come three times as often, differences once more: the LLM has not met them before
    "instruct": Stage((*TASKS, *IMAGE_TASKS, *IMAGE_TASKS, "posediff", "imagediff"), ("project",), 200, False,
                      dict(nano=(30, 8, 1e-3), tiny=(22_000, 8, 1.5e-3), paper=(1_900, 32, 5e-5))),
}
N_PEOPLE = dict(nano=(256, 64), tiny=(40_000, 40_000), paper=(40_000, 40_000))  # people, and how many are photographed


@dataclass
class Config:
    """Train UniPose, one stage or all of them."""
    stage: str = "all"  # backbones | tokenizer | retrieval | align | project | instruct, several with commas | all
    size: str = "tiny"  # nano | tiny | paper
    out: str = ""  # folder of the checkpoint; empty: out/<size>
    init: str = ""  # start from this folder instead of --out; A,B: from A, with what B alone has been through
    llm: str = ""  # your own backbones: a folder of Llama, Mistral or LLaVA; with --pose_vit, and --clip if no LLaVA
    clip: str = ""  # a CLIP folder
    pose_vit: str = ""  # a checkpoint of HMR2 or TokenHMR, or a VitPoseBackbone folder
    resume: bool = False  # go on from train_state.safetensors in --out; with --stage all, skip what is finished
    seed: int = 0  # every random number of the run follows from it
    steps: int = 0  # steps of the stage; 0: as in STAGES
    batch: int = 0  # samples a step; 0: as in STAGES
    lr: float = 0.0  # peak learning rate; 0: as in STAGES
    accumulate: int = 1  # cut each batch into this many parts to save memory; the gradient stays the same
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    save_every: int = 500  # steps between two states to resume from
    device: str = ""  # cpu | cuda | …; empty: the GPU where there is one
    data: str = ""  # JSON file of real data: {stage: {"KIND:PATH": weight}}; empty: the embedded world
    people: int = 0  # synthetic people; 0: as in PEOPLE
    photos: int = 0  # how many of them are photographed; 0: as in PEOPLE
    attn: str = ""  # mixed (paper) | mixed_all | causal; empty: as the checkpoint, or the paper
    vision: str = ""  # both (paper) | clip | pose, fixed when a model is made; empty: as for --attn
    projector: str = ""  # mlp (release) | linear (paper's formula), fixed when a model is made; empty: as for --attn
    lora_r: int = -1  # rank of LoRA in instruct; 0: all LLM weights train; -1: as the size says
    root_noise: bool = True  # tokenizer: turn poses at random, input and target together
    part_noise: bool = False  # tokenizer: disturb body parts of the input, the target stays clean


# ---- 2. Real data in the place of the embedded world ----------------------------------------------------------------
def tasks_offered(record):
    """What can be asked about a record. Where nothing is told of a picture, its pose is asked for."""
    held = {kind for kind, key in (("image", "image"), ("text", "texts"), ("pose", "pose")) if key in record}
    told = held - {"pose"} if {"image", "text"} <= held else held        # a picture with texts: its texts
    return tuple(task for task, row in TASKS.items() if row.pair == ("start" in record)
                 and {*row.inputs, row.target} in (told, held))


class RealData:
    """Real data in the place of `Mixture`: [k] -> (task, segments), a pure function of (seed, k).

    weights: {"KIND:PATH": how often an example comes from it}, of which the train split is taken. Everything is read,
    and every image decoded, before anything else happens. tasks: none = poses are drawn. Raises UserError.
    """

    def __init__(self, weights, tasks=(), seed=0, templates=N_TEMPLATES):
        self.tasks, self.seed, self.templates, self.groups = set(tasks), seed, templates, []
        for spec, weight in weights.items():
            rows = [r for r in read_records([spec]) if r.get("split", "train") == "train"
                    and (self.tasks & set(tasks_offered(r)) if tasks else "pose" in r)]
            if not rows:
                wanted = ", ".join(sorted(self.tasks)) or "the tokenizer"
                raise UserError(f"{spec} offers nothing of a train split for {wanted}")
            for offered, n in Counter(map(tasks_offered, rows)).items():
                self.groups.append((set(offered), [r for r in rows if tasks_offered(r) == offered], weight * n / len(rows)))

    def draw(self, k, *tasks):
        """Example k of some tasks, none: of all of them -> record, generator. Raises UserError."""
        rng, wanted = np.random.default_rng((self.seed, k)), set(tasks) or self.tasks
        weights = np.array([weight * (not wanted or bool(offered & wanted)) for offered, _, weight in self.groups])
        if not weights.sum() > 0:
            raise UserError(f"no data set of --data offers {' or '.join(sorted(wanted)) or 'poses'}")
        rows = self.groups[rng.choice(len(weights), p=weights / weights.sum())][1]
        return rows[rng.integers(len(rows))], rng

    def example(self, k, *tasks):
        """The same -> task, [its inputs in order, its target], generator."""
        record, rng = self.draw(k, *tasks)
        task = str(rng.choice(sorted((set(tasks) or self.tasks) & set(tasks_offered(record)))))
        poses = [torch.tensor(record[key])[None] for key in ("start", "pose") if key in record]
        if TASKS[task].frame == "body":                    # texts are about people who face front
            poses = [face_front(pose, poses[0] if record.get("together") else None) for pose in poses]

        def value_of(kind, which):
            if kind == "text":
                return str(rng.choice(record["texts"]))
            if kind == "image":
                return crop_picture(record, PICTURE_SIZE, "start_" if TASKS[task].pair and which == 0 else "")
            return poses[which][0]

        return task, task_values(task, value_of), rng

    def __getitem__(self, k):
        task, values, rng = self.example(k)
        return task, render_template(task, values, templates(task)[rng.integers(self.templates)])


# ---- 3. What is frozen is computed once --------------------------------------------------------------------------
class FeatureCache:
    """Codes and image features of all people, computed on first use by the frozen parts of the model.

    One object serves a whole run: no stage asks for codes or features before the stages that train those parts."""

    def __init__(self, model, world, photos, recorded=()):
        self.model, self.world, self.n_photos, self.recorded = model, world, photos, dict(recorded)

    def compute(self, tasks):
        """Fills the tables that these tasks look into: once, and before the first step."""
        self.poses
        if set(tasks) & set(IMAGE_TASKS):
            self.camera_poses, self.features

    def image(self, i):
        """(P,Dv) features of the photograph of person i."""
        return self.features[i]

    @cached_property
    def poses(self):
        """(n,N) codes of the heading-free poses."""
        return self._through(self.model.pose_tokenizer.encode, self.world.poses, "pose codes")

    @cached_property
    def camera_poses(self):
        """(photos,N) codes of the poses in the camera's frame."""
        return self._through(self.model.pose_tokenizer.encode, self.world.camera_poses[:self.n_photos], "codes of seen poses")

    @cached_property
    def features(self):
        """(photos,P,Dv) float16 features of the photographs."""
        return self._through(lambda pictures: self.model.vision(pictures).half(), self.photographs, "image features")

    @cached_property
    def photographs(self):
        """(photos,S,S,3) uint8."""
        return self._photos[0]

    @cached_property
    def spots(self):
        """(photos,22,2) where the joints are in the photographs, pixels."""
        return torch.tensor(self._photos[1], dtype=torch.float32)

    @cached_property
    def _photos(self):
        return [np.stack(rows) for rows in zip(*map(self.world.photo, progress_bar(range(self.n_photos), "photographs")))]

    @torch.no_grad()
    def _through(self, part, rows, what, size=128):
        """All rows through a frozen part of the model, in eval mode, on its device; the result stays on the CPU."""
        self.model.eval()
        done = []
        for start in progress_bar(range(0, len(rows), size), what):
            some = rows[start:start + size]
            done.append(part(some.to(self.model.device) if torch.is_tensor(some) else some).cpu())
        return torch.cat(done)


def progress_bar(rows, what):
    """A progress bar on standard error, of the first process only."""
    from tqdm import tqdm
    return tqdm(rows, desc=what, leave=False, dynamic_ncols=True, disable=not is_first())


# ---- 4. One function a stage: its modules, its loss --------------------------------------------------------------
class StageRun(NamedTuple):
    """modules: name -> what trains or changes; loss(rows, step) -> (loss, logs) for sample numbers `rows`, where
    logs["terms"] says how many terms the loss is the mean of."""
    modules: dict
    loss: object


def sample_index(n, k, seed):
    """Sample number k -> one of n people, each epoch in a new order; a function of (seed, k)."""
    return int(epoch_order(n, k // n, seed)[k % n])


@lru_cache(4)
def epoch_order(n, epoch, seed):
    """The order of n people in an epoch (n,)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class BackboneHeads(nn.Module):
    """What teaches the stand-ins, thrown away afterwards. Each patch of the pose ViT must tell which joints lie on it,
    and the mean of all patches the joints in space and the rotations: the mean is what an LLM reads by attending
    evenly. CLIP must match coarse captions (`World.coarse_caption`), read as bags of words."""

    def __init__(self, model):
        super().__init__()
        pose, clip = model.config["pose_vit"]["hidden_size"], model.config["clip"]["hidden_size"]
        self.spots = nn.Linear(pose, 22)
        self.body = nn.Sequential(nn.Linear(pose, 4 * pose), nn.GELU(), nn.Linear(4 * pose, 22 * 9))
        self.picture, self.words = nn.Linear(clip, 64), nn.Embedding(len(model.text_tokenizer), 64)
        self.scale = nn.Parameter(torch.tensor(10.0))


def flip_photos(pixels, poses, spots):
    """A photograph in a mirror: pixels (B,3,S,W), poses (B,22,3,3), spots (B,22,2) counted from its left edge."""
    spots = torch.stack([pixels.size(-1) - spots[:, MIRROR, 0], spots[:, MIRROR, 1]], -1)
    return pixels.flip(-1), mirror(poses), spots


def random_affine(pixels, spots):
    """Photographs (B,3,H,W) taken from a little further, aside and in other light, joints (B,22,2) in pixels with them:
    otherwise the pose ViT learns the photographs by heart (test error 164 mm where it is 135 on those it knows)."""
    size = torch.tensor([pixels.size(-1), pixels.size(-2)])
    zoom, shift = 0.95 + 0.25 * torch.rand(len(pixels), 1, 1), 0.2 * torch.rand(len(pixels), 2, 1) - 0.1
    grid = F.affine_grid(torch.cat([zoom * torch.eye(2), shift], 2), pixels.shape, align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    gain, bias = 0.8 + 0.4 * torch.rand(len(pixels), 3, 1, 1), 0.2 * torch.randn(len(pixels), 3, 1, 1)
    return pixels * gain + bias, ((2 * spots / size - 1 - shift.mT) / zoom + 1) * size / 2


def backbones(model, retrieval_model, frozen, config):
    """Stand-ins for two downloads, side by side: CLIP matches photographs and what they show, the pose ViT tells joints
    (pixels, then metres) and 6D rotations. They share batches, but no weight. The third, a small LLM, learns to speak
    in `align`: it gained nothing from captions alone beforehand."""
    heads, world, body = BackboneHeads(model).to(model.device), frozen.world, load_body()
    photographs, n, patch = frozen.photographs, frozen.n_photos, model.config["pose_vit"]["patch_size"][0]
    high, wide = model.config["pose_vit"]["image_size"]

    def body_loss(pictures, rows):
        pixels, poses, spots = model.vision.pose_pixels(pictures), world.camera_poses[rows], frozen.spots[rows]
        spots, half = spots - torch.tensor([(high - wide) / 2, 0]), len(rows) // 2  # the ViT sees the middle columns
        both = flip_photos(pixels[:half], poses[:half], spots[:half]), (pixels[half:], poses[half:], spots[half:])
        pixels, poses, spots = (torch.cat(parts) for parts in zip(*both))
        pixels, spots = random_affine(pixels, spots)
        seen = model.vision.pose_map(pixels.to(model.device))                               # (B,C,h,w)
        column, row = (spots / patch).long().unbind(-1)                                     # (B,22) each
        cells = row.clamp(0, seen.size(2) - 1) * seen.size(3) + column.clamp(0, seen.size(3) - 1)
        heat = heads.spots(seen.flatten(2).mT)                                              # (B,h*w,22)
        joints, sixd = heads.body(seen.mean((2, 3))).float().split([22 * 3, 22 * 6], -1)    # (B,66) (B,132)
        off = (joints.view(-1, 22, 3) - body.joints(poses).to(joints)).norm(dim=-1).mean()  # metres
        turned = F.l1_loss(sixd.view(-1, 22, 6), matrix_to_sixd(poses).to(sixd))
        return F.cross_entropy(heat, cells.to(heat.device)) + 5 * off + turned, 1000 * off.detach()

    def match_loss(pictures, ids, mask):
        states = model.vision.clip(model.vision.clip_pixels(pictures).to(model.device), output_hidden_states=True)
        seen = F.normalize(heads.picture(states.hidden_states[-2][:, 1:].mean(1)), dim=-1)  # (B,64)
        told = (heads.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)      # (B,64) a bag of words
        similarity = heads.scale * seen.float() @ F.normalize(told, dim=-1).float().T       # (B,B)
        same = (ids[:, None] == ids).all(-1).float()  # others of the batch may show the same
        own = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2

    def loss(rows, step):
        people = [sample_index(n, k, config.seed) for k in rows]
        pictures = photographs[people]
        ids, mask = (t.to(model.device) for t in tokenize_texts(model.text_tokenizer, map(world.coarse_caption, people)))
        posed, millimetres = body_loss(pictures, people)
        match = match_loss(pictures, ids, mask)
        return posed + match, {"joints_mm": millimetres, "match": match.detach(), "terms": len(rows)}

    return StageRun({"model": model, "heads": heads}, loss)


def tokenizer(model, retrieval_model, frozen, config):
    """Reconstruction through the codebook on the posed body (paper eq. 7), half of the people turned as a camera sees
    them. Embedded sizes pose an area-weighted subset of the vertices, `paper` all of them."""
    world, body = frozen.world, load_body().to(model.device)
    poses, total, real = torch.cat([world.poses, world.camera_poses]), schedule_of(config)[0], frozen.recorded.get("tokenizer")
    chosen = None if config.size == "paper" else sample_vertices(body)

    def loss(rows, step):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        target = (torch.tensor(np.stack([real.draw(k)[0]["pose"] for k in rows])) if real else
                  poses[[sample_index(len(poses), k, config.seed) for k in rows]]).to(model.device)
        given, target = augment(target, generator, config.root_noise, config.part_noise, step / total)
        loss, logs = tokenizer_loss(model.pose_tokenizer, target, body, chosen, given, generator)
        return loss, {**logs, "terms": len(rows)}

    return StageRun({"model": model}, loss)


def retrieval(model, retrieval_model, frozen, config):
    """Contrast of poses with captions, and of the pairs that they belong to with differences."""
    world, real = frozen.world, frozen.recorded.get("retrieval")

    def examples(rows):
        """Poses (B,22,3,3) and their captions, pairs (B,2,22,3,3) and their differences."""
        if real:
            poses, captions = zip(*(real.example(k, "pose2text")[1] for k in rows))
            starts, ends, changes = zip(*(real.example(k, "posediff")[1] for k in rows))
            return torch.stack(poses), captions, torch.stack([torch.stack(starts), torch.stack(ends)], 1), changes
        people = [sample_index(len(world.poses), k, config.seed) for k in rows]
        partners, rngs = [i ^ 1 for i in people], [np.random.default_rng((config.seed, k)) for k in rows]
        captions = [world.caption(i, rng) for i, rng in zip(people, rngs)]
        changes = [world.difference(i, rng) for i, rng in zip(people, rngs)]
        return world.poses[people], captions, torch.stack([world.poses[people], world.poses[partners]], 1), changes

    def loss(rows, step):
        poses, captions, both, changes = examples(rows)
        ids, mask = tokenize_texts(model.text_tokenizer, captions)
        one, logs = retrieval_model(poses.to(model.device), ids.to(model.device), mask.to(model.device))
        ids, mask = tokenize_texts(model.text_tokenizer, changes)
        two, pair_logs = retrieval_model(both.to(model.device), ids.to(model.device), mask.to(model.device))
        return one + two, {"top1": logs["top1"], "pair_top1": pair_logs["top1"], "terms": len(rows)}

    return StageRun({RETRIEVAL_PREFIX.rstrip("."): retrieval_model}, loss)


def init_code_embeddings(model):
    """Code words enter the LLM's vocabulary as what they stand for: the embedding of each starts as its vector of the
    codebook, turned at random to the LLM's width, so that poses alike begin as sentences alike. Embedded sizes only."""
    v, table = model.vocab, model.llm.model.embed_tokens.weight
    vectors = model.pose_tokenizer.state_dict()["quantizer.codebook"]                            # (K,C)
    vectors = (vectors - vectors.mean(0)) / vectors.std(0)
    turn = torch.randn(vectors.size(1), table.size(1)) / vectors.size(1) ** 0.5            # (C,D)
    with torch.no_grad():
        table[v.pose0:v.p_open] = 0.3 * vectors @ turn.to(vectors)
        table[v.query0:] = 0.3 * torch.randn(v.n_tokens, table.size(1))


def init_projector_scale(model, features):
    """The projector starts with all channels of features (n,P,Dv) on one scale, folded into its first layer: those of
    the small CLIP are ten times as large as the pose ViT's, which they would drown. Embedded sizes only."""
    first = model.projector if isinstance(model.projector, nn.Linear) else model.projector[0]
    some = features[:1000].to(first.weight).flatten(0, 1)                                   # (n*P,Dv)
    with torch.no_grad():
        first.weight /= some.std(0) + 1e-3
        first.bias -= first.weight @ some.mean(0)


def language(model, retrieval_model, frozen, config):
    """align, project, instruct: the next word and the codes of asked-for poses, over a mixture of tasks."""
    stage, mixture = STAGES[config.stage], frozen.recorded.get(config.stage)
    if not mixture:
        mixture = Mixture(stage.tasks, config.seed, frozen.world, frozen, stage.templates, frozen.n_photos)
        frozen.compute(stage.tasks)

    def loss(rows, step):
        return model(collate([model.encode(mixture[k][1]) for k in rows]))

    return StageRun({"model": model}, loss)


STAGE_RUNS = {"backbones": backbones, "tokenizer": tokenizer, "retrieval": retrieval,
        "align": language, "project": language, "instruct": language}


# ---- 5. The loop -------------------------------------------------------------------------------------------------
def schedule_of(config):
    """(steps, batch, peak lr) of the stage at this size, flags first."""
    steps, batch, lr = STAGES[config.stage].schedule[config.size]
    return config.steps or steps, config.batch or batch, config.lr or lr


def lr_at(step, steps, peak):
    """Linear warm-up over 3 % of the run, then a cosine down to zero (paper Table 3)."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def trainable(stage, size, lora_r=-1):
    """The pattern of the parameters that a stage trains. A small LLM has to learn to speak in `align`: all of it."""
    pattern = TRAINABLE[stage]
    if lora_r == 0 or (stage == "align" and size != "paper"):
        pattern = pattern.replace(LORA_PARAMETERS, LLM_PARAMETERS)
    return pattern


def freeze(config, modules):
    """Let exactly the stage's parameters learn, by name; returns name -> parameter."""
    pattern = trainable(config.stage, config.size, config.lora_r)
    learning = {}
    for name, module in modules.items():
        prefix = "" if name == "model" else name + "."
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(name == "heads" or re.match(pattern, prefix + key) is not None)
            if parameter.requires_grad:
                learning[prefix + key] = parameter
    return learning


def process_rank():
    """(number of this process, how many there are), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Does this process print and write?"""
    return process_rank()[0] == 0


def split_batch(step, batch, config):
    """The sample numbers of a step, cut for this process and for accumulation: list of lists."""
    rank, world = (0, 1) if STAGES[config.stage].needs_full_batch else process_rank()
    mine = range(step * batch + rank, (step + 1) * batch, world)
    return [mine[part::config.accumulate] for part in range(config.accumulate)]


def compute_gradient(job, learning, step, batch, config):
    """Fill .grad with that of the whole batch. Returns (logs averaged over it, its terms).

    Every part is weighed by its number of terms and the sum divided once, so that cutting changes nothing. A log is a
    mean over the part's terms, or a pair (sum, count) of its own."""
    sums = {}
    for rows in split_batch(step, batch, config):
        with bfloat16(config):
            loss, logs = job.loss(rows, step)
        terms = logs["terms"]
        (loss * terms).backward()
        pairs = {key: value if isinstance(value, tuple) else (terms * value, terms) for key, value in logs.items()}
        for key, pair in {"loss": (terms * loss.detach(), terms), **pairs, "terms": (terms, 1)}.items():
            sums[key] = sums.get(key, 0) + np.array([float(x) for x in pair])
    if not STAGES[config.stage].needs_full_batch and process_rank()[1] > 1:
        all_reduce(sums, learning, config)
    terms = sums.pop("terms")[0]
    for parameter in learning.values():
        if parameter.grad is not None:
            parameter.grad /= terms
    return {key: float(total / count) for key, (total, count) in sums.items() if count}, terms


def all_reduce(sums, learning, config):
    """Add up what all processes have: the sums of the logs, and the gradients, in place."""
    numbers = torch.tensor(np.stack(list(sums.values())), device=config.device)
    torch.distributed.all_reduce(numbers)
    sums.update(zip(sums, numbers.cpu().numpy()))
    for parameter in learning.values():  # a part without images leaves the projector without a gradient
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.distributed.all_reduce(parameter.grad)


def bfloat16(config):
    """bf16 on a GPU; float32 on a CPU, which gains nothing by it, for the tokenizer, whose codes would move, and for
    the retrieval_model, which should not depend on the machine."""
    wanted = config.device.startswith("cuda") and config.stage not in ("tokenizer", "retrieval")
    return torch.autocast("cuda", torch.bfloat16) if wanted else contextlib.nullcontext()


def make_optimisers(config, learning, peak):
    """AdamW (paper); at the embedded sizes Muon for the matrices inside the layers of a transformer, LoRA's left out:
    every direction of a matrix moves as far as the strongest one, and the same examples teach more (README).
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; steps scaled as in Liu et al. 2025."""
    inner = [name for name, parameter in learning.items() if config.size != "paper"
             and parameter.dim() == 2 and ".layer" in name and not name.endswith((".A", ".B"))]
    rest = [parameter for name, parameter in learning.items() if name not in inner]
    adamw = torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    if not inner:
        return [adamw]
    matrices = [learning[name] for name in inner]
    return [adamw, torch.optim.Muon(matrices, lr=peak, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]


def fit(job, config, out):
    """The one loop. Runs the stage to its end and returns the seconds it took, those before a resume included."""
    steps, batch, peak = schedule_of(config)
    learning = freeze(config, job.modules)
    optimisers = make_optimisers(config, learning, peak)
    start, before = load_state(job, learning, optimisers, config, out) if config.resume else (0, 0.0)
    print_learning(job, learning, config)
    begun, recent = time.perf_counter(), []
    for step in range(start, steps):
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, where there is any, is a function of the step
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = lr_at(step, steps, peak)
        logs, terms = compute_gradient(job, learning, step, batch, config)
        # three backbones side by side have no norm in common; all others are clipped (official scripts)
        norm = torch.nn.utils.clip_grad_norm_(learning.values(), 1.0 if config.stage != "backbones" else math.inf)
        if not math.isfinite(logs["loss"]):
            raise UserError(f"the loss of {config.stage} is {logs['loss']} at step {step}; "
                          f"lower --lr (now {peak:g}) and start the stage again")
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        recent.append({**logs, "grad": float(norm), "terms": terms})
        spent = time.perf_counter() - begun
        if (step + 1) % max(10, steps // 100) == 0 or step + 1 == steps:
            each = spent / (step - start + 1)
            keys = dict.fromkeys(key for row in recent for key in row)  # a batch without poses has no pose_acc
            means = {key: float(np.mean([row[key] for row in recent if key in row])) for key in keys}
            log_step(out, {"stage": config.stage, "step": step + 1, "of": steps, **means, "lr": lr_at(step, steps, peak),
                         "ms": 1000 * each, "terms_per_s": means["terms"] / each, "eta_s": each * (steps - step - 1)})
            recent.clear()
        if (step + 1) % config.save_every == 0 and step + 1 < steps:
            save_state(job, learning, optimisers, config, out, step + 1, before + spent)
    return before + time.perf_counter() - begun


def print_learning(job, learning, config):
    """Which parameters learn, by part: the one table that shows a wrong freeze."""
    if not is_first():
        return
    print(f"\n{config.stage}: {sum(p.numel() for p in learning.values()):,} parameters learn", flush=True)
    parts = {}
    for name, module in job.modules.items():
        for key, parameter in module.named_parameters():
            count = parts.setdefault(".".join(key.split(".")[:2]) if name == "model" else name, [0, 0])
            count[0] += parameter.numel() * parameter.requires_grad
            count[1] += parameter.numel()
    for part, (training, total) in parts.items():
        if training:
            print(f"    {part:<28}{training:>12,} of {total:,}")


NOT_SHOWN = ("stage", "step", "of", "terms", "ms", "terms_per_s", "eta_s")  # shown in words of their own, or not at all


def log_step(out, row):
    """One line on the screen, the same numbers in log.jsonl, both only from the first process."""
    if not is_first():
        return
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    shown = [f"{k} {v:.3g}" for k, v in row.items() if k not in NOT_SHOWN]
    minutes, seconds = divmod(round(row["eta_s"]), 60)
    print(f"{row['stage']:<9} {row['step']:>6}/{row['of']} | {' | '.join(shown)} | {row['ms']:.0f} ms | "
          f"{row['terms_per_s']:.0f} terms/s | {minutes}:{seconds:02d} left", flush=True)


# ---- 6. States to resume from ------------------------------------------------------------------------------------
# what a resumed run must not change
FIXED_SETTINGS = ("stage", "size", "seed", "steps", "batch", "lr", "accumulate", "data", "people", "photos", "attn", "lora_r",
         "root_noise", "part_noise")


def trainable_state(job, learning):
    """name -> tensor of everything the stage changes: parameters that learn, and buffers such as the codebook's."""
    buffers = {f"{name}.{key}": value for name, module in job.modules.items() for key, value in module.named_buffers()}
    return {**learning, **{"buffer." + key: value for key, value in buffers.items()}}


def save_state(job, learning, optimisers, config, out, step, seconds):
    """Write train_state.safetensors: weights, the optimisers' memory, where the run stands. One file, renamed when
    whole."""
    from safetensors.torch import save_file
    if not is_first():
        return
    state = {k: v.detach().cpu().contiguous().clone() for k, v in trainable_state(job, learning).items()}
    for name, parameter in learning.items():
        for optimiser in optimisers:
            for kind, value in optimiser.state.get(parameter, {}).items():
                state[f"memory.{kind}.{name}"] = value.cpu().contiguous()
    facts = {key: getattr(config, key) for key in FIXED_SETTINGS} | {"step": step, "seconds": seconds}
    with atomic_write(out / "train_state.safetensors") as path:
        save_file(state, path, metadata={"run": json.dumps(facts)})


def read_state(out):
    """What train_state.safetensors says of its run; {} where there is none. Raises UserError on a damaged one."""
    from safetensors import SafetensorError, safe_open
    path = out / "train_state.safetensors"
    if not path.exists():
        return {}
    try:
        with safe_open(str(path), "pt") as file:
            facts = json.loads(file.metadata()["run"])
        return {key: facts[key] for key in (*FIXED_SETTINGS, "step", "seconds")}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a complete state of a run; delete it, or leave --resume out") from None


def load_state(job, learning, optimisers, config, out):
    """Put train_state.safetensors back. Returns (step, seconds so far); (0, 0) where this stage kept no state."""
    path, facts = out / "train_state.safetensors", read_state(out)
    if facts.get("stage") != config.stage:
        return 0, 0.0
    changed = [f"--{key} {facts[key]} (now {now})" for key in FIXED_SETTINGS if facts[key] != (now := getattr(config, key))]
    if changed:
        raise UserError(f"{path} was made with {', '.join(changed)}; give the same flags, or leave --resume out")
    state = read_tensors(path)
    with torch.no_grad():
        for name, value in trainable_state(job, learning).items():
            if name not in state or state[name].shape != value.shape:
                raise UserError(f"{path} belongs to another model ({name} does not fit); leave --resume out")
            value.copy_(state[name])
    owner = {parameter: optimiser for optimiser in optimisers for group in optimiser.param_groups
             for parameter in group["params"]}
    for kind, name, value in ((*key.split(".", 2)[1:], state[key]) for key in state if key.startswith("memory.")):
        parameter = learning[name]
        owner[parameter].state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
    return facts["step"], facts["seconds"]


# ---- 7. Runs -----------------------------------------------------------------------------------------------------
def validate(config):
    """Every setting that cannot work is refused here, before anything is computed. Raises UserError."""
    def need(fine, sentence):
        if not fine:
            raise UserError(sentence)
    for stage in stages_to_run(config):
        need(stage in STAGES, f"--stage {stage} is not one of {', '.join(STAGES)}, all")
    for name, choices in {"size": tuple(SIZES), **CHOICES}.items():
        given = getattr(config, name)
        fine = given in choices or (name in CHOICES and not given)
        need(fine, f"--{name} {given} is not one of {', '.join(choices)}")
    for stage in stages_to_run(config):
        need(config.size in STAGES[stage].schedule, f"--stage {stage} is a download at --size {config.size}: give "
             "--llm and --pose_vit with the stages after it")
    for name, least in dict(steps=0, batch=0, people=0, photos=0, lr=0, accumulate=1, lora_r=-1, save_every=1).items():
        given = getattr(config, name)
        need(least <= given < 1e9, f"--{name} {given} must be at least {least}, and a number of this world")
    need(bool(config.llm) == bool(config.pose_vit) >= bool(config.clip), "--llm and --pose_vit come together, and "
         "--clip with them: they stand in for the stage backbones")
    fill_defaults(config)
    need(config.people % 2 == 0 and config.photos % 2 == 0, "--people and --photos must be even: people come in pairs")
    need(config.photos <= config.people, f"--photos {config.photos} is more than --people {config.people}")
    for stage in stages_to_run(config):
        batch, whole = config.batch or STAGES[stage].schedule[config.size][1], STAGES[stage].needs_full_batch
        cuts = config.accumulate * (1 if whole else process_rank()[1])
        need(batch % cuts == 0, f"--batch {batch} of {stage} does not cut into {cuts} parts (accumulate x processes)")
        need(cuts == 1 or not whole, f"the samples of a batch of {stage} learn from each other; leave --accumulate out")


def stages_to_run(config):
    """The stages that --stage names, in their order; of all of them those that are not downloads."""
    named = config.stage.split(",")
    if named == ["all"]:
        return [stage for stage, row in STAGES.items() if config.size in row.schedule and not (
            config.llm and stage == "backbones")]
    return sorted(named, key=[*STAGES, *named].index)


def fill_defaults(config):
    """Puts in what empty settings stand for."""
    people, photos = N_PEOPLE[config.size]
    config.people = config.people or people
    config.photos = config.photos or min(photos, config.people)
    config.out = config.out or f"out/{config.size}"
    config.lora_r = SIZES[config.size]["lora_r"] if config.lora_r < 0 else config.lora_r
    config.device = find_device(config.device or (f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available()
                                                  and process_rank()[1] > 1 else ""))


def real_data(config):
    """--data -> {stage: what it learns from}, all of it read and found readable. Raises UserError."""
    weights = load_json(config.data) if config.data else {}
    stages = [stage for stage in STAGES if stage != "backbones"]
    right = isinstance(weights, dict) and weights.keys() <= set(stages) and all(
        isinstance(sets, dict) and sets and all(isinstance(x, (int, float)) and x > 0 for x in sets.values())
        for sets in weights.values())
    if not right:
        raise UserError(f"{config.data} must name stages, of {', '.join(stages)}, and weights of the data sets of each")
    real = {stage: RealData(weights[stage], {"retrieval": ("pose2text", "posediff")}.get(stage, STAGES[stage].tasks),
                            config.seed, STAGES[stage].templates)
            for stage in stages if stage in weights and stage in stages_to_run(config)}
    for task in ("pose2text", "posediff") if "retrieval" in real else ():
        real["retrieval"].draw(0, task)                    # a batch needs both: better to find out now
    return real


def prepare_model(config, out, recorded):
    """(model, retrieval_model, notes of config.json): the checkpoint to go on from, or a fresh model where none is needed."""
    first, *others = config.init.split(",")
    folder, stages = pathlib.Path(first or out), stages_to_run(config)
    given = [*stages, "backbones"] if config.llm else stages
    needs = [need for stage in stages for need in STAGES[stage].needs if need not in given]
    exists = (folder / "config.json").exists()
    if config.stage == "all" and (config.init or (exists and not config.resume)):
        raise UserError(f"--stage all starts afresh, and {folder} holds a model; give --resume, or another --out")
    if config.llm and (config.init or exists and not config.resume):
        raise UserError(f"--llm begins a new model, and {folder} holds one; give another --out, or leave --llm out")
    if config.init or exists:
        return load_checkpoint(folder, others, needs, config)
    if needs:
        way = f"run `python train.py --stage all --size {config.size}`"
        if config.size not in STAGES[needs[0]].schedule:
            way = "give --llm and --pose_vit"
        raise UserError(f"--stage {config.stage} needs {', '.join(needs)} first, and {folder} holds no checkpoint; "
                      f"{way}, or --init FOLDER")
    torch.manual_seed(config.seed)
    chosen = {name: getattr(config, name) or choices[0] for name, choices in CHOICES.items()}
    fresh = model_config(config.size, **chosen)
    said = (row.get("texts", ()) for real in recorded.values() for _, rows, _ in real.groups for row in rows)
    model = (base_model(fresh, config.llm, config.clip, config.pose_vit) if config.llm
             else UniPose(fresh, word_tokenizer(vocabulary(text for some in said for text in some))))
    stages = ["backbones"] if config.llm else []
    return model, new_retrieval_model(model, config), {"stages": stages, "seconds": {}, "commands": {}}


def load_checkpoint(folder, others, needs, config):
    """The same from a checkpoint that, with `others`, has been through the stages `needs`. Raises UserError where it does
    not fit."""
    notes, state = read_config(folder), {}
    for other in others:
        state |= trained_alone(other, notes)
    missing = [stage for stage in needs if stage not in notes.get("stages", [])]
    if missing:
        raise UserError(f"--stage {config.stage} needs {', '.join(missing)}, which {folder} has not been through; "
                      f"run `python train.py --stage {missing[0]} --out {folder}` first")
    if notes["size"] != config.size:
        raise UserError(f"{folder} holds a {notes['size']} model, not {config.size}; give --size {notes['size']}")
    for name in ("vision", "projector"):
        if getattr(config, name) not in ("", notes[name]):
            raise UserError(f"{folder} was made with --{name} {notes[name]}; another one needs a run from the beginning")
    if notes["lora"] and "instruct" in stages_to_run(config) and config.lora_r != notes["lora_r"]:
        raise UserError(f"{folder} has LoRA of rank {notes['lora_r']} already; --lora_r {config.lora_r} needs a folder "
                      "that has not been through instruct")
    model = load(folder)
    model.config["attn"] = config.attn or model.config["attn"]
    retrieval_model = load_retrieval_model(folder) or new_retrieval_model(model, config)
    for name, module in {"": model, RETRIEVAL_PREFIX: retrieval_model}.items():
        own = {name + key: value for key, value in module.state_dict().items()}
        load_strictly(module, {k.removeprefix(name): state.get(k, v) for k, v in own.items()}, config.init)
    return model, retrieval_model, notes


def trained_alone(folder, notes):
    """name -> tensor of the stages that only this folder has been through, which are added to `notes`: stages that do
    not need each other can be trained side by side. Raises UserError."""
    theirs, state = read_config(folder), {}
    if theirs["size"] != notes["size"] or theirs["lora"]:
        raise UserError(f"--init: {folder} cannot be joined: it holds a {theirs['size']} model"
                      + ", with LoRA in it" * theirs["lora"])
    tensors = read_tensors(pathlib.Path(folder) / "model.safetensors")
    for stage in [stage for stage in theirs["stages"] if stage not in notes["stages"]]:
        pattern = trainable(stage, notes["size"])
        state |= {key: value for key, value in tensors.items() if re.match(pattern, key)}
        notes["stages"].append(stage)
        for told in ("seconds", "commands"):               # a base model that was given has none
            notes[told] |= {key: value for key, value in theirs[told].items() if key == stage}
    return state


def new_retrieval_model(model, config):
    """An untrained retrieval model of the size's width, the same whatever was trained before it."""
    torch.manual_seed(config.seed)
    return Retrieval(len(model.text_tokenizer), d=dict(nano=32, tiny=64, paper=512)[config.size])


def run_stage(config, model, retrieval_model, frozen, notes, out):
    """Train one stage and write the checkpoint with everything trained so far."""
    if config.stage == "instruct" and config.lora_r:
        model.config["lora_r"] = config.lora_r
        torch.manual_seed(config.seed)
        model.grow_lora()
    model.to(config.device)
    retrieval_model.to(config.device)
    if config.checkpointing:
        model.llm.gradient_checkpointing_enable()
    torch.manual_seed(config.seed)
    if config.size != "paper" and config.stage not in notes["stages"]:
        if config.stage == "align":
            init_code_embeddings(model)
        if config.stage == "project" and "project" not in frozen.recorded:
            init_projector_scale(model, frozen.features)
    job = STAGE_RUNS[config.stage](model, retrieval_model, frozen, config)
    for module in job.modules.values():
        module.train()
    seconds = fit(job, config, out)
    if is_first():
        save_checkpoint(config, model, retrieval_model, notes, out, seconds)
        print(f"{config.stage} done in {seconds / 60:.1f} minutes; wrote {out}", flush=True)


def save_checkpoint(config, model, retrieval_model, notes, out, seconds):
    """Write the checkpoint after a stage, note what made it, and draw the curves."""
    def rests(stage):  # on an older version of the one that was trained now: it no longer stands
        return stage == config.stage or any(map(rests, STAGES[stage].needs))
    notes["stages"] = [*(stage for stage in notes["stages"] if not rests(stage)), config.stage]
    notes["seconds"][config.stage], notes["commands"][config.stage] = round(seconds), provenance()["command"]
    told = {key: notes[key] for key in ("stages", "seconds", "commands")}
    extra = {}
    if "retrieval" in notes["stages"]:
        extra, told["retrieval"] = {RETRIEVAL_PREFIX + k: v for k, v in retrieval_model.state_dict().items()}, retrieval_model.config
    save(model, out, extra=extra, seed=config.seed, people=config.people, photos=config.photos, **told)
    (out / "train_state.safetensors").unlink(missing_ok=True)
    plot_losses(out)


def wait_for_first(model, out):
    """What one process has trained alone, the others read from its checkpoint."""
    torch.distributed.barrier()
    if not is_first():
        state = read_tensors(out / "model.safetensors")
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith(RETRIEVAL_PREFIX)})


def plot_losses(out, size=(360, 240)):
    """log.jsonl -> loss.png: one panel a stage, log10 of the loss over steps, first and last value written on it."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    rows = {(row["stage"], row["step"]): row for row in rows}.values()  # steps done again after a cut count once
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    sheet = Image.new("RGB", (size[0] * min(3, len(stages)), size[1] * math.ceil(len(stages) / 3)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, stage in enumerate(stages):
        left, top = size[0] * (k % 3), size[1] * (k // 3)
        losses = [(row["step"] / row["of"], max(row["loss"], 1e-6)) for row in rows if row["stage"] == stage]
        low, high = (math.log10(f(y for _, y in losses)) for f in (min, max))
        scale = (size[1] - 65) / max(high - low, 1e-9)
        spots = [(left + 20 + x * (size[0] - 40), top + 40 + (high - math.log10(y)) * scale) for x, y in losses]
        draw.rectangle((left + 20, top + 40, left + size[0] - 20, top + size[1] - 25), outline=(200, 200, 200))
        draw.line(spots, fill=(200, 60, 40), width=2)
        told = f"{stage}: loss {losses[0][1]:.3g} to {losses[-1][1]:.3g}, log scale"
        draw.text((left + 20, top + 18), told, fill="black")
    with atomic_write(out / "loss.png") as path:
        sheet.save(path, format="PNG")


def main(argv=None):
    """Trains what the flags ask for."""
    config = cli(Config, argv)
    validate(config)
    if process_rank()[1] > 1 and not torch.distributed.is_initialized():  # patient: whole stages are the first's alone
        torch.distributed.init_process_group(timeout=datetime.timedelta(days=2))
    out = pathlib.Path(config.out)
    recorded = real_data(config)
    model, retrieval_model, notes = prepare_model(config, out, recorded)
    config.attn = model.config["attn"]
    out.mkdir(parents=True, exist_ok=True)
    stages = [s for s in stages_to_run(config) if not (config.resume and already_trained(s, config, notes, out))]
    if not stages:
        print(f"{out} has been through {config.stage} already; there is nothing to resume")
    frozen = FeatureCache(model, World("train", config.people, model.vision.clip_size), config.photos, recorded)
    for stage in stages:
        if is_first() or not STAGES[stage].needs_full_batch:
            run_stage(dataclasses.replace(config, stage=stage), model, retrieval_model, frozen, notes, out)
        if process_rank()[1] > 1:
            wait_for_first(model, out)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def already_trained(stage, config, notes, out):
    """Has the folder itself, not only --init, been through a stage, and was it not begun again?"""
    return stage in notes["stages"] and not config.init and read_state(out).get("stage") != stage


if __name__ == "__main__":
    run_main(main)
