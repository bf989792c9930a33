"""A pose is 22 rotations; 80 code words say it.

A language model reads and writes words. To let it speak of bodies, a pose is spelled with N words out of a vocabulary
of K (UniPose §3.1). A VQ-VAE finds that spelling: an encoder turns the 22 joints into N vectors, each is replaced by
the nearest of K learned code vectors, whose *number* is the word, and a decoder turns code vectors back into a pose.

    22 rotations           N latents              N ids              N code vectors        22 rotations
    (B,22,3,3)             (B,C,N)                (B,N)              (B,C,N)               (B,22,3,3)
    pelvis   R0   ─6D─►    ░▒░▓░ … ▒   nearest    812 7 1290 … 44    ▓░▒░▒ … ░   ─────►    pelvis   R0'
    left_hip R1  encoder   ▒░▓░░ … ░  ─ of K ──►        │            ░▒▓░▒ … ▓  decoder    left_hip R1'
    ⋮                                                   ▼                                  ⋮
                                          what the language model sees

"Nearest" has no gradient. Two old tricks get around it: backwards, the quantizer pretends to be the identity
(straight-through), and the codes follow the latents that chose them by moving averages, so they need no gradient.
How wrong a pose is gets measured where people look: at rotations, at joints, and at the skin of a posed body.

Letters: B batch, J=22 joints, N pose tokens (80), K codes (2048), C numbers in a code, V body vertices, F triangles.
A pose is `rotmat (…,22,3,3)`: root first, then SMPL's joints 1-21, each relative to its parent. Body frame: metres,
y up, +z front, +x the person's left, pelvis at the origin.

Also here, because every other file needs it: the user's mistakes, flags from dataclasses, safe files, rotations,
bodies, a small renderer, photographs, pose files, synthetic people.

    python tokenizer.py                          # one pose through everything below, and a picture of it
    python tokenizer.py --pose walk.npz:120      # frame 120 of an AMASS sequence
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import json
import math
import os
import pathlib
import pickle
import re
import sys
import typing

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = pathlib.Path(__file__).resolve().parent
ASSETS = HERE / "assets"
TINY = str(HERE / "weights" / "tiny")                       # what ships, and what every script asks by default


# ---- 1. The VQ-VAE: encoder, quantizer, decoder --------------------------------------------------
@dataclasses.dataclass
class TokenizerConfig:
    """Sizes of a PoseTokenizer; the defaults are the paper's."""
    hidden: int = 512  # channels of the convolutions
    code_dim: int = 256  # numbers in one code
    codes: int = 2048  # K, code words to choose from
    upsample_step: int = 2  # how often the encoder doubles its 40 places: 2 -> N=80 tokens, 1 -> 40, 0 -> 20
    mu: float = 0.99  # memory of the codebook's moving averages
    z_up: bool = False  # its code words mean poses in AMASS's world, as the official ones do; ours turn at the door

    @property
    def n_tokens(self):
        """N: 40 places, doubled upsample_step times, halved once by the strided convolution."""
        return 40 * 2 ** self.upsample_step // 2


class ResUnit(nn.Module):
    """x + conv1(conv3(x)), a ReLU before each: looks `dilation` tokens to both sides."""

    def __init__(self, width, dilation):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))  # (B,width,N)


class ResBlock(nn.Module):
    """Two units, the wide one first: dilation 3, then 1, in encoder and decoder alike, as officially."""

    def __init__(self, width):
        super().__init__()
        self.model = nn.Sequential(ResUnit(width, 3), ResUnit(width, 1))

    def forward(self, x):
        return self.model(x)


def upsample_stages(lengths, width):
    """For each length: resize the axis to it by repeating neighbours, then convolve."""
    layers = []
    for length in lengths:
        layers += [nn.Upsample(size=length), nn.Conv1d(width, width, 3, padding=1), nn.ReLU()]
    return layers


class Encoder(nn.Module):
    """22 joints of 6 numbers -> N latents. The attribute repeats the class's name: official weights load by it."""

    def __init__(self, config):
        super().__init__()
        width, steps = config.hidden, range(config.upsample_step + 1)
        self.encoder = nn.Sequential(
            nn.Conv1d(6, width, 3, padding=1), nn.ReLU(), *upsample_stages([40 * 2 ** k for k in steps], width),
            nn.Conv1d(width, width, 4, stride=2, padding=1), ResBlock(width),
            nn.Conv1d(width, config.code_dim, 3, padding=1))

    def forward(self, sixd):
        """sixd (B,22,6) -> latents (B,C,N)."""
        return self.encoder(sixd.mT)                       # joints are the axis that convolutions slide along


class Decoder(nn.Module):
    """N code vectors -> 22 joints of 6 numbers, shrinking the axis in four even steps (80: 65, 51, 36, 22)."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden
        lengths = np.linspace(22, config.n_tokens, 4, endpoint=False).astype(int)[::-1].tolist()
        self.decoder = nn.Sequential(
            nn.Conv1d(config.code_dim, width, 3, padding=1), nn.ReLU(), *upsample_stages(lengths, width),
            ResBlock(width), nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, 6, 3, padding=1))

    def forward(self, latents):
        """latents (B,C,N) -> sixd (B,22,6)."""
        return self.decoder(latents).mT


class Quantizer(nn.Module):
    """Snaps each latent to the nearest of K codes; the codes follow the latents by moving averages, not by gradients.

    All that training changes lives in buffers, so that a checkpoint resumes exactly (the official one keeps
    only the codebook, and starts it again from the first batch).
    """

    def __init__(self, config):
        super().__init__()
        self.mu = config.mu
        self.register_buffer("codebook", torch.zeros(config.codes, config.code_dim))
        self.register_buffer("code_sum", torch.zeros(config.codes, config.code_dim))
        self.register_buffer("code_count", torch.ones(config.codes))
        self.register_buffer("initialised", torch.tensor(False))

    def nearest(self, latents):
        """latents (B,C,N) -> ids (B,N): |x|² - 2 x·c + |c|², the lowest index wins a tie."""
        x = latents.mT                                                                       # (B,N,C)
        cost = x.square().sum(-1, keepdim=True) - 2 * x @ self.codebook.T + self.codebook.square().sum(1)
        return cost.argmin(-1)                                                               # (B,N)

    def forward(self, latents, generator=None, rows=None):
        """latents (B,C,N) -> codes (B,C,N) with straight-through gradient, ids (B,N), {commit, perplexity, active}.

        In training the codebook moves. rows (K,): which latents of the batch (counted row by row) fill the codebook
        at the first step, and dead codes later; by default `generator` draws them.
        """
        flat = latents.detach().mT.flatten(0, 1)                                             # (B*N,C)
        spare = self._random_latents(flat, generator, rows) if self.training else None                # (K,C)
        if self.training and not self.initialised:
            self.codebook.copy_(spare)                     # random codes would lie far from every latent
            self.code_sum.copy_(spare)
            self.initialised.fill_(True)
        ids = self.nearest(latents.detach())                                                 # (B,N)
        codes = self.codebook[ids].mT                                                        # (B,C,N)
        counts = torch.bincount(ids.flatten(), minlength=len(self.codebook)).to(flat.dtype)  # (K,)
        if self.training:
            self._ema_update(flat, ids.flatten(), counts, spare)
        share = counts / counts.sum()
        info = {"commit": F.mse_loss(latents, codes),
                "perplexity": torch.exp(-(share * torch.log(share + 1e-7)).sum()),
                "active": (counts > 0).to(flat.dtype).mean()}
        return latents + (codes - latents).detach(), ids, info

    def _random_latents(self, flat, generator, rows):
        """K latents of this batch, to stand in for codes that nobody uses."""
        (K, C), have = self.codebook.shape, len(flat)
        if rows is None and have >= K:
            rows = torch.randperm(have, generator=generator)[:K]
        if rows is not None:
            spare = flat[rows.to(flat.device)]
        else:                                              # too few: take them again, a little apart from each other
            rows = torch.randint(have, (K,), generator=generator)
            noise = torch.randn(K, C, generator=generator) * 0.01 / math.sqrt(C)
            spare = flat[rows.to(flat.device)] + noise.to(flat)
        return spare

    def _ema_update(self, flat, ids, counts, spare):
        """Each code -> the running mean of the latents that chose it; codes with a running count below 1 are dead."""
        sums = torch.zeros_like(self.code_sum).index_add_(0, ids, flat)  # (K,C)
        self.code_sum.mul_(self.mu).add_(sums, alpha=1 - self.mu)
        self.code_count.mul_(self.mu).add_(counts, alpha=1 - self.mu)
        alive = (self.code_count >= 1)[:, None]            # (K,1)
        self.codebook.copy_(torch.where(alive, self.code_sum / self.code_count[:, None], spare))


class PoseTokenizer(nn.Module):
    """A pose as N words of a vocabulary of K, and back: UniPose §3.1. Stays in float32: bfloat16 changes the words."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config or TokenizerConfig()
        self.n_tokens = self.config.n_tokens
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)
        self.quantizer = Quantizer(self.config)

    def _encode(self, rotmat):
        """rotmat (B,22,3,3) -> latents (B,C,N)."""
        return self.encoder(matrix_to_sixd(turn_root(rotmat, Z_UP_TO_Y_UP.T) if self.config.z_up else rotmat))

    def _decode(self, codes):
        """Code vectors (B,C,N) -> rotmat (B,22,3,3)."""
        rotmat = sixd_to_matrix(self.decoder(codes))
        return turn_root(rotmat, Z_UP_TO_Y_UP) if self.config.z_up else rotmat

    def forward(self, rotmat, generator=None, rows=None):
        """rotmat (B,22,3,3) -> its reconstruction (B,22,3,3), ids (B,N), the quantizer's info. For training."""
        codes, ids, info = self.quantizer(self._encode(rotmat), generator, rows)               # (B,C,N), (B,N)
        return self._decode(codes), ids, info                                                  # (B,22,3,3)

    @torch.no_grad()
    def encode(self, rotmat):
        """rotmat (B,22,3,3) -> ids (B,N)."""
        return self.quantizer.nearest(self._encode(rotmat.float()))

    @torch.no_grad()
    def decode(self, ids):
        """ids (B,N) -> rotmat (B,22,3,3)."""
        return self._decode(self.quantizer.codebook[ids].mT)

    @torch.no_grad()
    def decode_soft(self, probs):
        """probs (B,N,K), each query's distribution over the codes -> rotmat (B,22,3,3) of the average code vectors."""
        return self._decode((probs.float() @ self.quantizer.codebook).mT)


# ---- 2. Its loss, and the noise it is trained with -----------------------------------------------
PARTS = [[1, 4, 7, 10], [2, 5, 8, 11], [3, 6, 9], [12, 15], [13, 16, 18, 20], [14, 17, 19, 21]]   # legs torso head arms
NOISE = (0.01, 0.05, 0.1, 0.1, 0.5, 0.5)                   # radians, for each sixth of the run; the official steps


def sample_vertices(body, n=425, seed=0):
    """n vertices, more where there is more surface; always the same ones -> indices (n,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(body.area.cpu(), n, generator=generator).to(body.faces.device)


def tokenizer_loss(tokenizer, rotmat, body, chosen=None, noised=None, generator=None, rows=None):
    """The paper's loss, 20 pose + 100 joints + 100 vertices + commitment. -> loss (), {name: weighted term or figure}.

    rotmat (B,22,3,3): the target. noised: what the encoder sees instead. chosen (n,): pose only these vertices, drawn
    by area (`some_vertices`), each counting the same; None: all of them, weighted by area, posed by smplx.
    """
    made, ids, info = tokenizer(rotmat if noised is None else noised, generator, rows)
    if chosen is None:
        weights, pose = body.area[:, None], body
    else:
        weights, pose = 1.0, lambda turns: body.skin(turns, chosen)
    with torch.no_grad():
        joints, vertices = pose(rotmat)                    # (B,22,3), (B,V or n,3)
    made_joints, made_vertices = pose(made)                # gradients flow through the body into the decoder
    terms = {"pose": 20 * F.mse_loss(made, rotmat), "joints": 100 * F.mse_loss(made_joints, joints),
             "vertices": 100 * (weights * (made_vertices - vertices).square()).mean(), "commit": info["commit"]}
    mpjpe = 1000 * (made_joints - joints).norm(dim=-1).mean()  # millimetres
    figures = {"mpjpe": mpjpe, "perplexity": info["perplexity"], "active": info["active"]}
    return sum(terms.values()), {k: v.detach() for k, v in (terms | figures).items()}


def augment(rotmat, generator, root=True, parts=False, progress=1.0):
    """Training noise: rotmat (B,22,3,3) -> what the encoder sees, and what it must answer, both (B,22,3,3).

    root: turn the person, in input and target alike: up to 45 degrees about the vertical, 20 about the others.
    parts: on half of the batch one limb, the torso or the head is disturbed in the input only, so that the code words
    learn to mend poses; progress (0..1 of the run) sets how much.
    """
    B, draw = len(rotmat), lambda *shape: 2 * torch.rand(*shape, generator=generator) - 1
    if root:
        # the official code adds to the root's Euler angles (z up there); turning the world is free of their poles
        lean, turn, roll = (draw(B, 3) * torch.tensor([20.0, 45.0, 20.0]) * math.pi / 180).unbind(1)
        o = torch.zeros(B)
        spin = aa_to_matrix(torch.stack([torch.stack(v, 1) for v in ([o, turn, o], [lean, o, o], [o, o, roll])]))
        rotmat = turn_root(rotmat, spin[0] @ spin[1] @ spin[2])
    if not parts:
        return rotmat, rotmat                              # a clean input
    # differs from the official code, whose noise lands on a copy and does nothing
    member = torch.stack([torch.isin(torch.arange(22), torch.tensor(part)) for part in PARTS]).float()
    hit = member[torch.randint(len(PARTS), (B,), generator=generator)]                       # (B,22)
    hit = hit * (torch.randperm(B, generator=generator) < (B + 1) // 2)[:, None]
    strength = NOISE[min(int(progress * len(NOISE)), len(NOISE) - 1)]
    shake = aa_to_matrix(strength * hit[..., None] * draw(B, 22, 3)).to(rotmat)           # (B,22,3,3)
    return rotmat @ shake, rotmat                          # joints wobble in their own frames


# ---- 3. The skeleton: 22 joints ------------------------------------------------------------------
JOINTS = ("pelvis left_hip right_hip spine1 left_knee right_knee spine2 left_ankle right_ankle spine3 left_foot "
          "right_foot neck left_collar right_collar head left_shoulder right_shoulder left_elbow right_elbow "
          "left_wrist right_wrist").split()
PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19]
SWAP = {"left": "right", "right": "left"}
MIRROR = [JOINTS.index(re.sub("left|right", lambda side: SWAP[side[0]], name)) for name in JOINTS]


# ---- 4. Rotations --------------------------------------------------------------------------------
Z_UP_TO_Y_UP = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])          # AMASS's world (z up) -> ours (y up)


def aa_to_matrix(aa):
    """Axis-angle (...,3), radians -> rotation matrices (...,3,3). Rodrigues' formula, smooth at 0."""
    angle = torch.linalg.vector_norm(aa, dim=-1)[..., None, None]  # its gradient at 0 is 0, not nan
    x, y, z = aa.unbind(-1)
    o = torch.zeros_like(x)
    K = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))  # K v = axis x v
    # torch.sinc is sin(pi x)/(pi x): it has the limits at 0 built in, where sin(t)/t would be 0/0
    first, second = torch.sinc(angle / math.pi), 0.5 * torch.sinc(angle / (2 * math.pi)) ** 2
    return torch.eye(3, dtype=aa.dtype, device=aa.device) + first * K + second * (K @ K)


def matrix_to_quaternion(matrix):
    """Rotation matrices (...,3,3) -> unit quaternions (...,4), w x y z, w >= 0.

    4 q qᵀ is linear in R. Each of its rows is q times a factor; the row with the largest factor is the one to trust,
    at any angle (a formula that starts from w alone loses the sign near pi).
    """
    a, b, c, d, e, f, g, h, i = matrix.flatten(-2).unbind(-1)
    rows = torch.stack([1 + a + e + i, h - f, c - g, d - b,
                        h - f, 1 + a - e - i, b + d, c + g,
                        c - g, b + d, 1 - a + e - i, f + h,
                        d - b, c + g, f + h, 1 - a - e + i], -1).unflatten(-1, (4, 4))
    best = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*rows.shape[:-2], 1, 4)
    q = F.normalize(rows.gather(-2, best).squeeze(-2), dim=-1)  # length at least 1: smooth everywhere
    return torch.where(q[..., :1] < 0, -q, q)              # q and -q are the same rotation


def matrix_to_aa(matrix):
    """Rotation matrices (...,3,3) -> axis-angle (...,3), angle in [0, pi]."""
    w, xyz = matrix_to_quaternion(matrix).split([1, 3], -1)  # cos(angle/2), axis sin(angle/2)
    sine = torch.linalg.vector_norm(xyz, dim=-1, keepdim=True)
    tiny = sine < 1e-7                                     # there angle/sine is 2; the other branch would give nan
    return xyz * torch.where(tiny, 2.0, 2 * torch.atan2(sine, w) / torch.where(tiny, 1.0, sine))


def matrix_to_sixd(matrix):
    """(...,3,3) -> (...,6): the first two ROWS, as in the official release (others keep columns)."""
    return matrix[..., :2, :].flatten(-2)                  # continuous, unlike any set of three numbers


def sixd_to_matrix(sixd):
    """(...,6) any two rows -> (...,3,3): Gram-Schmidt makes them orthonormal, their cross product is the third."""
    first = F.normalize(sixd[..., :3], dim=-1)
    second = sixd[..., 3:] - (first * sixd[..., 3:]).sum(-1, keepdim=True) * first  # what is across the first
    second = F.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -2)


def mirror(rotmat):
    """The pose (...,22,3,3) as seen in a mirror: left and right joints change places, M R M with M = diag(-1,1,1)."""
    sign = torch.tensor([-1.0, 1.0, 1.0], dtype=rotmat.dtype, device=rotmat.device)
    return rotmat[..., MIRROR, :, :] * sign[:, None] * sign  # M R M, element by element


def turn_root(rotmat, turn):
    """The person as a whole, turned: rotmat (...,22,3,3) with turn (...,3,3) before its root."""
    return torch.cat([turn.to(rotmat)[..., None, :, :] @ rotmat[..., :1, :, :], rotmat[..., 1:, :, :]], -3)


def face_front(rotmat, like=None):
    """Turns poses (M,22,3,3) about +y to heading 0 - to the heading 0 of the poses `like`, if given.

    The heading is the last Euler angle of AMASS's z-up root, as in PoseScript: the way that the person's left points.
    It jumps by half a turn where someone lies on the side (PoseScript does it too).
    """
    left = (rotmat if like is None else like)[:, 0, :, 0]
    angle = torch.atan2(-left[:, 2], left[:, 0])           # z-up (x, y) is our (x, -z)
    return turn_root(rotmat, aa_to_matrix(-angle[:, None] * torch.eye(3)[1]))


def kinematics(rotmat, rest):
    """Walks the tree from the pelvis out. rotmat (...,22,3,3), rest joints (22,3).

    -> rotations in the body frame (...,22,3,3), joints (...,22,3) with the pelvis where it rests.
    """
    turns, places = [rotmat[..., 0, :, :]], [rest[0].expand(*rotmat.shape[:-3], 3)]
    for j, parent in enumerate(PARENTS[1:], 1):
        turns.append(turns[parent] @ rotmat[..., j, :, :])  # (...,3,3)
        places.append(places[parent] + turns[parent] @ (rest[j] - rest[parent]))  # (...,3), carried by its parent
    return torch.stack(turns, -3), torch.stack(places, -2)  # (...,22,3,3), (...,22,3)


def forward_kinematics(rotmat, rest):
    """rotmat (...,22,3,3), rest (22,3) metres -> joints (...,22,3), pelvis at 0. Differentiable."""
    return kinematics(rotmat, rest - rest[0])[1]


# ---- 5. The body ---------------------------------------------------------------------------------
BODY_SHAPES = {"v_template": ("V", 3), "f": ("F", 3), "weights": ("V", "J"), "J_regressor": ("J", "V"),
               "kintree_table": (2, "J"), "posedirs": ("V", 3, "P")}


def read_body(path):
    """Reads and checks one body file -> its arrays, sizes agreeing. Raises UserError."""
    arrays, sizes = read_arrays(path, BODY_SHAPES), {}
    for name, shape in BODY_SHAPES.items():
        if name not in arrays:
            raise UserError(f"{path} holds no {name}: give an SMPL, SMPL-H or SMPL-X model file")
        found = arrays[name].shape                         # a letter takes the first size met, then holds it
        fits = len(found) == len(shape) and all(sizes.setdefault(s, n) == n if isinstance(s, str) else s == n
                                                for s, n in zip(shape, found))
        if not fits or arrays[name].dtype.kind not in "iuf" or not np.isfinite(arrays[name]).all():
            raise UserError(f"{name} in {path} is {found} {arrays[name].dtype}, not {shape} finite numbers that fit "
                          "the rest: the file is damaged or not a body model")
    parents = arrays["kintree_table"][0].astype(np.int64)  # the root's is 2^32-1 or -1: never read
    if sizes["J"] < 24 or sizes["P"] != 9 * (sizes["J"] - 1) or parents[1:22].tolist() != PARENTS[1:]:
        raise UserError(f"{path} has another skeleton ({sizes['J']} joints): SMPL, SMPL-H and SMPL-X are read")
    if arrays["f"].min() < 0 or arrays["f"].max() >= sizes["V"] or (parents[1:] >= np.arange(1, sizes["J"])).any():
        raise UserError(f"{path} points at vertices or joints that it does not have: the file is damaged")
    return arrays, parents


def smpl_layout(arrays, parents):
    """Any of the body families -> SMPL's own layout of 24 joints, so that one code path poses them all.

    Fingers and face do not move here: whatever hangs on a wrist joins SMPL's rigid hand, jaw and eyes join the head.
    """
    home = list(range(22))                                 # where each joint of the file goes among the 24
    for parent in parents[22:]:
        home.append({20: 22, 21: 23}.get(home[parent], home[parent]))
    weights = np.zeros((len(arrays["v_template"]), 24))
    np.add.at(weights.T, home, arrays["weights"].T)        # several fingers add up in one place
    first = [home.index(j) for j in range(24)]             # rigid hands: any knuckle does as their joint
    posedirs = np.zeros((len(weights), 3, 207))
    posedirs[:, :, :189] = arrays["posedirs"][:, :, :189]  # 9 numbers for each of the 21 body joints; hands stay zero
    return {"v_template": arrays["v_template"], "f": arrays["f"].astype(np.int64), "weights": weights,
            "J_regressor": arrays["J_regressor"][first], "posedirs": posedirs,
            "shapedirs": np.zeros((len(weights), 3, 10)),  # betas are always zero: the mean person
            "kintree_table": np.array([PARENTS + [20, 21], range(24)])}


def vertex_area(template, faces):
    """How much skin a vertex stands for -> (V,): the sum of its triangles' areas, scaled to 0..1 each."""
    a, b, c = template[faces].unbind(1)
    areas = torch.linalg.cross(b - a, c - a).norm(dim=-1)
    areas = (areas - areas.min()) / (areas.max() - areas.min())  # the smallest triangle counts nothing
    return torch.zeros_like(template[:, 0]).index_add_(0, faces.flatten(), areas.repeat_interleave(3))


class Body(nn.Module):
    """A skinned human of mean shape: rest (22,3), template (V,3), both from the pelvis; faces (F,3), weights (V,24)."""

    def __init__(self, arrays, name=""):
        super().__init__()
        import smplx  # slow to import: only who poses pays

        spots = ("nose", "reye", "leye", "rear", "lear")   # smplx wants five face vertices by name; we read none
        with contextlib.redirect_stdout(io.StringIO()):    # it prints remarks about shape coefficients
            self.smpl = smplx.SMPL("", data_struct=smplx.utils.Struct(**arrays), vertex_ids=dict.fromkeys(spots, 0),
                                   use_hands=False, use_feet_keypoints=False)
        self.smpl.requires_grad_(False)                    # a ruler, not a part that learns
        self.name = name
        rest = arrays["J_regressor"] @ arrays["v_template"]
        mine = {"rest": rest[:22] - rest[0], "template": arrays["v_template"] - rest[0], "weights": arrays["weights"],
                "posedirs": arrays["posedirs"][:, :, :189]}
        for key, array in mine.items():                    # not persistent: checkpoints must not carry licensed bodies
            self.register_buffer(key, torch.as_tensor(array, dtype=torch.float32), persistent=False)
        self.register_buffer("faces", torch.as_tensor(arrays["f"]), persistent=False)
        self.register_buffer("area", vertex_area(self.template, self.faces), persistent=False)

    def forward(self, rotmat):
        """rotmat (B,22,3,3) -> joints (B,22,3), vertices (B,V,3), metres, pelvis at the origin. Posed by smplx."""
        hands = torch.eye(3, dtype=rotmat.dtype, device=rotmat.device).expand(len(rotmat), 2, 3, 3)
        posed = self.smpl(global_orient=rotmat[:, :1], body_pose=torch.cat([rotmat[:, 1:], hands], 1),
                          betas=rotmat.new_zeros(len(rotmat), 10), pose2rot=False)
        pelvis = posed.joints[:, :1]                       # (B,1,3) where the file puts it, and none of ours
        return posed.joints[:, :22] - pelvis, posed.vertices - pelvis

    def joints(self, rotmat):
        """rotmat (...,22,3,3) -> joints (...,22,3): the skeleton alone, much faster than the skin."""
        return forward_kinematics(rotmat, self.rest)

    def skin(self, rotmat, chosen):
        """Linear blend skinning of the vertices `chosen` (n,) only: rotmat (B,22,3,3) -> joints (B,22,3), (B,n,3).

        The same numbers as smplx, for a training step that cannot afford every vertex (SMPL paper, equations 2-9).
        """
        turns, joints = kinematics(rotmat, self.rest)                                        # (B,22,3,3), (B,22,3)
        bent = (rotmat[:, 1:] - torch.eye(3, device=rotmat.device)).flatten(1)               # (B,189)
        shape = self.template[chosen] + torch.einsum("bp,nkp->bnk", bent, self.posedirs[chosen])         # (B,n,3)
        weights = self.weights[chosen, :22].clone()
        weights[:, 20:] += self.weights[chosen, 22:]                                         # hands follow the wrists
        shift = joints - (turns @ self.rest[:, :, None]).squeeze(-1)                         # (B,22,3)
        turn = torch.einsum("nj,bjkl->bnkl", weights, turns)                                 # (B,n,3,3) blended
        return joints, (turn @ shape[..., None]).squeeze(-1) + weights @ shift               # (B,n,3)


def load_body(path=""):
    """Reads a body: "" the free one in assets/, else an SMPL .pkl or .npz, SMPL-H or SMPL-X .npz. Raises UserError."""
    path = pathlib.Path(path or ASSETS / "body.npz")
    return Body(smpl_layout(*read_body(path)), path.stem)


# ---- 6. Shared by all scripts: user errors, flags, files -----------------------------------------
class UserError(Exception):
    """A user's mistake, in one sentence: what is wrong, where, and what to do about it."""


def first_line(error):
    """The first line of what an exception says: libraries like to go on."""
    said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return (said or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def as_user_error(before, after=""):
    """Whatever goes wrong inside, and a damaged file can raise nearly anything, is a UserError that names the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(before + first_line(error) + after) from error


@contextlib.contextmanager
def skip_bad_entry(skipped, where):
    """Whatever goes wrong with the entry of a data set inside is noted in the list `skipped`; the next one may do."""
    try:
        yield
    except Exception as error:
        skipped.append(f"{where}: {first_line(error)}")


class Parser(argparse.ArgumentParser):
    """argparse that raises `UserError` instead of printing its usage and leaving."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def cli(Config, argv=None):
    """Turns the dataclass `Config` into flags and parses argv (None: the command line). -> a Config.

    The comment behind a field is its help text. bool: --x / --no-x; list[str]: repeat the flag. Raises UserError.
    """
    about = (sys.modules[Config.__module__].__doc__ or "").strip().split("\n\n")[0]
    parser = Parser(description=about, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    # the source is the only place that knows comments; one line per field keeps this a one-line pattern
    comments = dict(re.findall(r"^ +(\w+) *:[^#\n]*#\s*(.*?)\s*$", inspect.getsource(Config), re.M))
    kinds = typing.get_type_hints(Config)                  # types, also where annotations are strings
    for field in dataclasses.fields(Config):
        kind, default = kinds[field.name], field.default
        text = comments.get(field.name, "").replace("%", "%%")  # argparse formats its help
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is list:
            how, text, default = dict(action="append", metavar="X"), text + " (may be repeated)", None
        else:
            how = dict(type=kind, metavar=kind.__name__.upper())
        shown = "" if default in (None, "") else f" [{default}]"
        names = dict.fromkeys(["--" + field.name, "--" + field.name.replace("_", "-" if kind is str else "_")])
        parser.add_argument(*names, help=text + shown, default=argparse.SUPPRESS, **how)
    known, unknown = parser.parse_known_args(argv)         # so that a typing error can be answered
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown argument {unknown[0]}: {hint}(--help lists the flags)")
    config = Config(**vars(known))                         # absent flags keep the dataclass's defaults
    if not 0 <= getattr(config, "seed", 0) < 2 ** 32:
        raise UserError(f"--seed {config.seed} must be from 0 to {2 ** 32 - 1}")
    return config


def run_main(main):
    """Runs main(). A UserError, or a file that cannot be written, becomes one line on stderr and exit code 2."""
    try:
        main()
    except BrokenPipeError:                                # the reader of a pipe (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        what = error if isinstance(error, UserError) else f"{error.filename or 'the output'}: {error.strerror or error}"
        print(f"error: {what}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None                    # what a shell expects after Ctrl-C


@contextlib.contextmanager
def atomic_write(path):
    """`with saving(path) as new:` write a file at `new`; it takes the name `path` only when it is complete.

    Whatever goes wrong, nothing half-written stays behind. A failed write, or a folder of that name, raises UserError.
    """
    path = pathlib.Path(path)
    if path.is_dir() or not path.name:
        raise UserError(f"{path} is a folder: name a file")
    new = path.with_name(f".{os.getpid()}-{path.name}")    # same folder (a rename must not cross disks), same suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, path)
    except BaseException as error:                         # Ctrl-C as well
        with contextlib.suppress(OSError):                 # cleaning up must not hide the first error
            new.unlink()
        # safetensors and torch.save report a full disk as errors of their own kinds
        if isinstance(error, OSError) or re.search("os error|enforce fail|iostream", str(error)):
            raise UserError(f"cannot write {path}: {first_line(error)}. Free some space or choose another place") from error
        raise


def list_files(path, *suffixes):
    """The file itself, or all files below a folder that end in one of the suffixes, in order."""
    path = pathlib.Path(path)
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)


def load_json(path):
    """What a JSON file holds. Raises UserError."""
    with as_user_error(f"{path} is not a complete JSON file: "):
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


@functools.cache
def load_asset(name):
    """The table assets/NAME.json, whose words and numbers a reader may edit. It is shared: nobody changes it."""
    return load_json(ASSETS / f"{name}.json")


class Pickled:
    """Stands in for the chumpy and scipy objects inside an SMPL pickle: keeps their state, runs none of their code."""

    def __init__(self, *arguments):
        self.state = {}

    def __setstate__(self, state):
        self.state = state

    def array(self):
        """The numbers that the object held."""
        state = {key: to_plain(value) for key, value in self.state.items()}
        if "indptr" in state:                              # scipy's compressed columns -> a dense matrix
            dense = np.zeros(tuple(state.get("_shape", state.get("shape"))))
            columns = np.repeat(np.arange(dense.shape[1]), np.diff(state["indptr"]))
            np.add.at(dense, (state["indices"], columns), state["data"])
            return dense
        if "idxs" in state:                                # chumpy's Select: chosen elements of another array
            return state["a"].ravel()[state["idxs"]].reshape(state["preferred_shape"])
        return state["x"]                                  # chumpy's plain array


def to_plain(value):
    """A Pickled stand-in -> its array; anything else as it is."""
    return value.array() if isinstance(value, Pickled) else value


def latin1(text, encoding="latin1"):
    """How Python 3 pickles bytes under protocol 2."""
    return text.encode("latin1")


def number(dtype, data):
    """How numpy pickles a single number. Its own maker would take bytes for pointers to objects."""
    return np.frombuffer(data, dtype)[0]


RECONSTRUCT = np.ndarray(0).__reduce__()[0]                # numpy's own maker of empty arrays, wherever it lives now
FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]              # the same of newer pickles
ALLOWED = {
    "chumpy.ch Ch": Pickled, "chumpy.reordering Select": Pickled,
    "scipy.sparse.csc csc_matrix": Pickled, "scipy.sparse._csc csc_matrix": Pickled,
    "numpy.core.multiarray _reconstruct": RECONSTRUCT, "numpy._core.multiarray _reconstruct": RECONSTRUCT,
    "numpy ndarray": np.ndarray, "numpy dtype": np.dtype, "__builtin__ set": set, "_codecs encode": latin1,
    "numpy.core.multiarray scalar": number, "numpy._core.multiarray scalar": number,
    "numpy.core.numeric _frombuffer": FROM_BUFFER, "numpy._core.numeric _frombuffer": FROM_BUFFER,
}


class SafeUnpickler(pickle.Unpickler):
    """Reads arrays, as of an SMPL .pkl. A pickle is a program; this one may call nothing outside ALLOWED."""

    def find_class(self, module, name):
        if f"{module} {name}" not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}")
        return ALLOWED[f"{module} {name}"]


def read_arrays(path, wanted):
    """The arrays named `wanted` that a .npz, .npy (then named "") or SMPL .pkl holds -> {name: array}. Raises UserError.

    Nothing in the file is executed, and entries that are not wanted are not even looked at.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}: check the path")
    with as_user_error(f"cannot read {path}: ", f". Is it a complete {path.suffix} file of plain arrays?"):
        if path.suffix.lower() == ".pkl":
            with open(path, "rb") as file:
                entries = SafeUnpickler(file, encoding="latin1").load()
            return {name: np.asarray(to_plain(entries[name])) for name in wanted if name in entries}
        entries = np.load(path, allow_pickle=False)        # object arrays are pickles: refused
        if isinstance(entries, np.ndarray):
            return {"": entries}
        with entries:
            return {name: entries[name] for name in wanted if name in entries.files}


# ---- 7. Run me -----------------------------------------------------------------------------------
# A person of the training split who points to the side, in whole degrees: the axis-angle of each
# joint that leaves the T-pose.
EXAMPLE = {
    "left_hip": (-3, 9, 2),
    "right_hip": (-3, -6, -6),
    "neck": (11, -7, -1),
    "head": (11, -7, -1),
    "left_shoulder": (0, 0, -87),
    "left_elbow": (0, -9, 0),
    "right_shoulder": (-16, 2, -5),
}


def example_pose():
    """The pose of EXAMPLE -> rotmat (22,3,3): what `python tokenizer.py` and `python captions.py` show."""
    degrees = torch.zeros(len(JOINTS), 3)
    for joint, angles in EXAMPLE.items():
        degrees[JOINTS.index(joint)] = torch.tensor(angles)
    return aa_to_matrix(torch.deg2rad(degrees))


def load_pose_tokenizer(folder):
    """The pose tokenizer alone out of a weights folder, in eval mode, float32. Raises UserError."""
    from safetensors.torch import load_file
    folder = pathlib.Path(folder)
    with as_user_error(f"{folder} is not a complete weights folder: "):
        sizes = load_json(folder / "config.json")["tokenizer"]
        tensors = load_file(folder / "model.safetensors")
        tokenizer = PoseTokenizer(TokenizerConfig(**sizes))
        prefix = "pose_tokenizer."
        tokenizer.load_state_dict({name.removeprefix(prefix): tensor.float()
                                   for name, tensor in tensors.items() if name.startswith(prefix)})
    return tokenizer.eval()


@dataclasses.dataclass
class Config:
    """Turn one pose into the code words of a trained tokenizer, and back."""
    weights: str = TINY  # a trained folder


def main():
    """Prints one pose as code words, and how far off it comes back."""
    config = cli(Config)
    tokenizer = load_pose_tokenizer(config.weights)
    body = load_body()
    rotmat = example_pose()

    sixd = matrix_to_sixd(rotmat)
    codes = tokenizer.encode(rotmat[None])                                                   # (1,N)
    decoded = tokenizer.decode(codes)                                                        # (1,22,3,3)
    error = 1000 * (body.joints(decoded[0]) - body.joints(rotmat)).norm(dim=-1)              # (22,) mm

    print(f"a pose        22 rotations; in 6D {sixd.numel()} numbers")
    print(f"in words      {' '.join(map(str, codes[0].tolist()))}")
    print(f"              {tokenizer.n_tokens} words out of {tokenizer.config.codes}")
    print(f"and back      {error.mean():.1f} mm off, mean of 22 joints")
    for joint in ("left_knee", "left_elbow", "left_wrist", "right_wrist", "head"):
        print(f"    {joint:<12}{error[JOINTS.index(joint)]:>6.1f} mm")


if __name__ == "__main__":
    run_main(main)
