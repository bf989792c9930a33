"""Encode a 3D human pose as 80 code words with a VQ-VAE, and decode it again.

A language model reads and writes words. To let it read and write poses as well, UniPose (section
3.1) spells a pose with N words out of a vocabulary of K. A VQ-VAE learns the spelling: an encoder
turns the 22 joints into N latents, each latent is replaced by the nearest of K code vectors, and a
decoder turns the code vectors back into a pose. The *numbers* of the code vectors are the words.

    rotations            latents                ids            code vectors           rotations
    (B,22,3,3)           (B,C,N)                (B,N)          (B,C,N)                (B,22,3,3)

    pelvis   R0          ░▒░▓░ … ▒              812            ▓░▒░▒ … ░              pelvis   R0'
    left_hip R1  ──────► ▒░▓░░ … ░  ──────────► 7    ────────► ░▒▓░▒ … ▓  ──────────► left_hip R1'
    ⋮            encoder ⋮         nearest of K ⋮     look up  ⋮            decoder   ⋮
                                                │
                                                └─► the words of the language model

"Nearest" has no gradient. Two old tricks get around that: in the backward pass the quantizer acts
as the identity (straight-through), and each code follows the latents that chose it by a moving
average, so that codes need no gradient. The loss compares the two poses by their rotations, by
their joints and by the skin of a posed body.

Letters: B batch, J=22 joints, N pose tokens (80), K codes (2048), C numbers in a code, V body
vertices, F triangles. A pose is `rotmat (…,22,3,3)`: the root first, then SMPL's joints 1-21, each
relative to its parent. Body frame: metres, y up, +z front, +x the person's left, pelvis at 0.

The file also holds the skeleton, the rotations and the body of all other files, and in section 6
what every script needs: user errors, flags and safe reading and writing of files.

Left out: hands, face, body shape and motion. A pose is one moment of 22 joints on a mean body. The
training loop is in train.py (--stage tokenizer).

    python tokenizer.py                       # the code words of one pose, and its decoding error
    python tokenizer.py --weights out/tiny    # the same with a tokenizer that you trained
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import json
import math
import mmap
import os
import pathlib
import pickle
import re
import shlex
import shutil
import stat
import sys
import tempfile
import typing
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent
if not (ROOT / "assets").is_dir():
    ROOT = ROOT / "unipose_data"  # `pip install .` puts assets/ and weights/ there
ASSETS = ROOT / "assets"
TINY = str(ROOT / "weights" / "tiny")  # the trained model that ships, every script's default


# ---- 1. The VQ-VAE: encoder, quantizer, decoder --------------------------------------------------
@dataclasses.dataclass
class TokenizerConfig:
    """Sizes of a PoseTokenizer; the defaults are the paper's."""
    hidden: int = 512  # channels of the convolutions
    code_dim: int = 256  # C, numbers in one code
    codes: int = 2048  # K, code words to choose from
    upsample_step: int = 2  # how often the encoder doubles its 40 places: 2 gives N=80
    mu: float = 0.99  # decay of the codebook's moving averages
    z_up: bool = False  # codes are in AMASS's z-up frame, as the official ones are
    reset_revived: bool = False  # a dead code that is replaced loses its running sum as well

    @property
    def n_tokens(self):
        """N: 40 places, doubled upsample_step times, halved once by the strided convolution."""
        return 40 * 2 ** self.upsample_step // 2


TOKENIZER_ENTRIES = {  # what they may be in the config of a checkpoint, see `check_entries`
    "hidden": range(1, 2 ** 14),
    "code_dim": range(1, 2 ** 14),
    "codes": range(1, 2 ** 20),
    "upsample_step": range(7),
    "mu": float,
    "z_up": bool,
    "reset_revived": bool,
}


class ResUnit(nn.Module):
    """A residual unit. Its first convolution sees the places `dilation` to the left and right."""

    def __init__(self, width, dilation):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x):
        h = self.conv1(F.relu(x))
        return x + self.conv2(F.relu(h))                                      # (B,width,N)


class ResBlock(nn.Module):
    """Two units with dilation 3, then 1, in the encoder and in the decoder, as in the release."""

    def __init__(self, width):
        super().__init__()
        self.model = nn.Sequential(ResUnit(width, 3), ResUnit(width, 1))

    def forward(self, x):
        return self.model(x)


def upsample_stages(lengths, width):
    """For each length: resize the axis to it by repeating neighbours, then convolve."""
    layers = []
    for length in lengths:
        layers.append(nn.Upsample(size=length))
        layers.append(nn.Conv1d(width, width, 3, padding=1))
        layers.append(nn.ReLU())
    return layers


class Encoder(nn.Module):
    """22 joints of 6 numbers -> N latents.

    Official weights load by name, hence an attribute `encoder` in the Encoder.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden
        lengths = [40 * 2 ** k for k in range(config.upsample_step + 1)]      # N=80: 40, 80, 160
        self.encoder = nn.Sequential(                                         # (B,6,22)
            nn.Conv1d(6, width, 3, padding=1),                                # (B,width,22)
            nn.ReLU(),
            *upsample_stages(lengths, width),                                 # (B,width,2N)
            nn.Conv1d(width, width, 4, stride=2, padding=1),                  # (B,width,N)
            ResBlock(width),
            nn.Conv1d(width, config.code_dim, 3, padding=1),                  # (B,C,N)
        )

    def forward(self, sixd):
        """sixd (B,22,6) -> latents (B,C,N)."""
        return self.encoder(sixd.mT)  # convolutions slide along the joints


class Decoder(nn.Module):
    """N code vectors -> 22 joints of 6 numbers; the axis shrinks in four even steps."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden
        excess = config.n_tokens - 22
        lengths = [22 + excess * k // 4 for k in (3, 2, 1, 0)]                # N=80: 65, 51, 36, 22
        self.decoder = nn.Sequential(                                         # (B,C,N)
            nn.Conv1d(config.code_dim, width, 3, padding=1),                  # (B,width,N)
            nn.ReLU(),
            *upsample_stages(lengths, width),                                 # (B,width,22)
            ResBlock(width),
            nn.Conv1d(width, width, 3, padding=1),
            nn.Conv1d(width, 6, 3, padding=1),                                # (B,6,22)
        )

    def forward(self, z_q):
        """z_q (B,C,N) -> sixd (B,22,6)."""
        return self.decoder(z_q).mT


class Quantizer(nn.Module):
    """Replaces each latent by the nearest of K codes, which learn by moving averages.

    All that training changes is in buffers, so that a checkpoint resumes exactly. (The official
    checkpoint has only the codebook and starts it again from the first batch.)
    """

    def __init__(self, config):
        super().__init__()
        self.mu = config.mu
        self.reset_revived = config.reset_revived
        self.register_buffer("codebook", torch.zeros(config.codes, config.code_dim))
        self.register_buffer("code_sum", torch.zeros(config.codes, config.code_dim))
        self.register_buffer("code_count", torch.ones(config.codes))
        self.register_buffer("initialised", torch.tensor(False))

    def nearest(self, latents):
        """latents (B,C,N) -> ids (B,N); of equally near codes the lowest id wins."""
        x = latents.mT                                                        # (B,N,C)
        # |x - c|² = |x|² - 2 x·c + |c|², without a tensor of shape (B,N,K,C)
        x_square = x.square().sum(-1, keepdim=True)                           # (B,N,1)
        code_square = self.codebook.square().sum(1)                           # (K,)
        distance = x_square - 2 * x @ self.codebook.T + code_square           # (B,N,K)
        return distance.argmin(-1)                                            # (B,N)

    def forward(self, latents, generator=None, rows=None):
        """latents (B,C,N) -> z_q (B,C,N), ids (B,N), {commit, perplexity, active}.

        In training the codebook moves. rows (K,) says which latents of the batch, counted along
        (B*N), fill the codebook at the first step and replace dead codes later; by default they
        are drawn from `generator`.
        """
        flat = latents.detach().mT.flatten(0, 1)                              # (B*N,C)
        if self.training:
            candidates = self._random_latents(flat, generator, rows)          # (K,C)
            if not self.initialised:
                self._start_from(candidates)

        ids = self.nearest(latents.detach())                                  # (B,N)
        z_q = self.codebook[ids].mT                                           # (B,C,N)
        counts = torch.bincount(ids.flatten(), minlength=len(self.codebook))  # (K,)
        if self.training:
            self._ema_update(flat, ids.flatten(), counts, candidates)

        usage = counts / counts.sum()
        entropy = -(usage * torch.log(usage + 1e-7)).sum()
        stats = {
            "commit": F.mse_loss(latents, z_q),
            "perplexity": torch.exp(entropy),  # how many codes are in use, as if all equally often
            "active": (counts > 0).float().mean(),
        }
        z_q = latents + (z_q - latents).detach()  # straight-through: the gradient of the identity
        return z_q, ids, stats

    def _random_latents(self, flat, generator, rows):
        """K of the latents flat (B*N,C), chosen by `rows` or at random -> (K,C)."""
        K, C = self.codebook.shape
        if rows is None and len(flat) >= K:
            rows = torch.randperm(len(flat), generator=generator)[:K]
        if rows is not None:
            return flat[rows.to(flat.device)]

        # there are fewer than K: some come more than once, and noise keeps these apart
        rows = torch.randint(len(flat), (K,), generator=generator)
        noise = torch.randn(K, C, generator=generator) * 0.01 / math.sqrt(C)
        return flat[rows.to(flat.device)] + noise.to(flat)

    def _start_from(self, candidates):
        """The first codebook is made of latents: random vectors would lie far from all of them."""
        self.codebook.copy_(candidates)
        self.code_sum.copy_(candidates)
        self.initialised.fill_(True)

    def _ema_update(self, flat, ids, counts, candidates):
        """Moves each code to the running mean of the latents that chose it.

        A code whose running count is below 1 is dead and becomes a candidate. In the public code it
        keeps the sum and the count of its former place, so that it jumps away once it is chosen;
        with `reset_revived` it starts as one latent that chose it.
        """
        sums = torch.zeros_like(self.code_sum).index_add_(0, ids, flat)       # (K,C)
        self.code_sum.mul_(self.mu).add_(sums, alpha=1 - self.mu)
        self.code_count.mul_(self.mu).add_(counts, alpha=1 - self.mu)

        is_alive = self.code_count[:, None] >= 1                              # (K,1)
        mean = self.code_sum / self.code_count[:, None]                       # (K,C)
        self.codebook.copy_(torch.where(is_alive, mean, candidates))
        if self.reset_revived:
            self.code_sum.copy_(torch.where(is_alive, self.code_sum, candidates))
            self.code_count.clamp_(min=1)


def in_float32(method):
    """Runs a method of PoseTokenizer outside of autocast, in which poses would get other words."""
    @functools.wraps(method)
    def run(self, x, *args, **options):
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args, **options)
    return run


class PoseTokenizer(nn.Module):
    """A pose as N words out of K, and back (UniPose, section 3.1).

    Computes in float32 wherever it is called: in bfloat16 a fifth of the words would be others.
    """

    def __init__(self, config=None):
        super().__init__()
        self.config = config or TokenizerConfig()
        self.n_tokens = self.config.n_tokens
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quantizer = Quantizer(self.config)

    def _encode(self, rotmat):
        """rotmat (B,22,3,3) -> latents (B,C,N)."""
        if self.config.z_up:
            rotmat = turn_root(rotmat, Z_UP_TO_Y_UP.T)
        return self.encoder(matrix_to_sixd(rotmat))

    def _decode(self, z_q):
        """z_q (B,C,N) -> rotmat (B,22,3,3)."""
        rotmat = sixd_to_matrix(self.decoder(z_q))
        if self.config.z_up:
            rotmat = turn_root(rotmat, Z_UP_TO_Y_UP)
        return rotmat

    @in_float32
    def forward(self, rotmat, generator=None, rows=None):
        """For training: rotmat (B,22,3,3) -> recon (B,22,3,3), ids (B,N), the quantizer's stats."""
        latents = self._encode(rotmat.float())                                # (B,C,N)
        z_q, ids, stats = self.quantizer(latents, generator, rows)            # (B,C,N), (B,N)
        return self._decode(z_q), ids, stats                                  # (B,22,3,3)

    @torch.no_grad()
    @in_float32
    def encode(self, rotmat):
        """rotmat (B,22,3,3) -> ids (B,N)."""
        latents = self._encode(rotmat.float())                                # (B,C,N)
        return self.quantizer.nearest(latents)

    @torch.no_grad()
    @in_float32
    def decode(self, ids):
        """ids (B,N) -> rotmat (B,22,3,3)."""
        z_q = self.quantizer.codebook[ids].mT                                 # (B,C,N)
        return self._decode(z_q)

    @in_float32
    def decode_soft(self, probs):
        """probs (B,N,K), a distribution over the codes per token -> rotmat (B,22,3,3).

        Decodes the mean code vector under each distribution instead of the most likely one. Unlike
        that one it is differentiable: an error of the pose reaches the distributions.
        """
        z_q = (probs.float() @ self.quantizer.codebook).mT                    # (B,C,N)
        return self._decode(z_q)


# ---- 2. Its loss, and the noise it is trained with -----------------------------------------------
PARTS = [
    [1, 4, 7, 10],  # left leg
    [2, 5, 8, 11],  # right leg
    [3, 6, 9],  # torso
    [12, 15],  # head
    [13, 16, 18, 20],  # left arm
    [14, 17, 19, 21],  # right arm
]
PART_NOISE = [0.01, 0.05, 0.1, 0.1, 0.5, 0.5]  # radians, for each sixth of the run, as officially


def sample_vertices(body, n=425, seed=0):
    """Draws n vertices by the area around them, the same ones for the same seed -> ids (n,)."""
    generator = torch.Generator().manual_seed(seed)
    vertex_ids = torch.multinomial(body.area.cpu(), n, generator=generator)
    return vertex_ids.to(body.faces.device)


def tokenizer_loss(
    tokenizer, target, body, vertex_ids=None, noisy_input=None, generator=None, rows=None
):
    """The paper's loss: 20 pose + 100 joints + 100 vertices + commitment -> loss, {name: term}.

    target (B,22,3,3). noisy_input: what the encoder sees instead of the target. vertex_ids (n,):
    pose only these vertices, as drawn by `sample_vertices`; None: pose all of them and weight each
    by its area. generator, rows: see Quantizer.forward.
    """
    encoder_input = target if noisy_input is None else noisy_input
    recon, _, stats = tokenizer(encoder_input, generator, rows)               # (B,22,3,3)

    with torch.no_grad():
        joints, vertices = body(target, vertex_ids)                           # (B,22,3), (B,V|n,3)
    # the body is differentiable: the errors of joints and vertices reach the decoder through it
    recon_joints, recon_vertices = body(recon, vertex_ids)

    vertex_error = (recon_vertices - vertices).square()                       # (B,V|n,3)
    if vertex_ids is None:
        vertex_error = body.area[:, None] * vertex_error
    terms = {
        "pose": 20 * F.mse_loss(recon, target),
        "joints": 100 * F.mse_loss(recon_joints, joints),
        "vertices": 100 * vertex_error.mean(),
        "commit": stats["commit"],
    }

    logs = terms | {
        "mpjpe": 1000 * (recon_joints - joints).norm(dim=-1).mean(),  # millimetres
        "perplexity": stats["perplexity"],
        "active": stats["active"],
    }
    logs = {name: value.detach() for name, value in logs.items()}
    return sum(terms.values()), logs


def uniform(shape, generator):
    """Random numbers, uniform in [-1, 1)."""
    return 2 * torch.rand(shape, generator=generator) - 1


def augment(rotmat, generator, root=True, parts=False, progress=1.0):
    """Training noise: rotmat (B,22,3,3) -> the encoder's input and the target, both (B,22,3,3).

    root: turn the whole person at random, in input and target alike. parts: disturb one part of the
    body in half of the inputs, so that the codes learn to repair poses; its strength grows with
    progress, from 0 to 1 over the run.
    """
    if root:
        rotmat = turn_root(rotmat, random_turns(len(rotmat), generator))
    if parts:
        return disturb_parts(rotmat, generator, progress), rotmat
    return rotmat, rotmat


def random_turns(n, generator):
    """n random rotations (n,3,3): up to 45 degrees about the vertical, 20 about the other axes."""
    # the official code adds noise to Euler angles of the root, which are singular at some poses
    limits = torch.tensor([20.0, 45.0, 20.0])  # degrees
    angles = uniform((n, 3), generator) * limits * math.pi / 180              # (n,3)
    x_turn = rotation_about(0, angles[:, 0])                                  # (n,3,3)
    y_turn = rotation_about(1, angles[:, 1])
    z_turn = rotation_about(2, angles[:, 2])
    return y_turn @ x_turn @ z_turn


def disturb_parts(rotmat, generator, progress):
    """Rotates the joints of one random part in half of the poses (B,22,3,3) by random angles."""
    # differs from the official code, which adds this noise to a copy that is never used
    B = len(rotmat)
    members = torch.zeros(len(PARTS), 22)  # which joints are of which part
    for k, joints in enumerate(PARTS):
        members[k, joints] = 1

    part = torch.randint(len(PARTS), (B,), generator=generator)               # (B,)
    is_disturbed = torch.randperm(B, generator=generator) < (B + 1) // 2      # (B,)
    joint_mask = members[part] * is_disturbed[:, None]                        # (B,22)

    sixth = min(int(progress * len(PART_NOISE)), len(PART_NOISE) - 1)
    scale = PART_NOISE[sixth] * joint_mask[..., None]                         # (B,22,1)
    noise = aa_to_matrix(scale * uniform((B, 22, 3), generator))              # (B,22,3,3)
    return rotmat @ noise.to(rotmat)


# ---- 3. The skeleton: 22 joints ------------------------------------------------------------------
JOINTS = [
    "pelvis",
    "left_hip", "right_hip", "spine1",
    "left_knee", "right_knee", "spine2",
    "left_ankle", "right_ankle", "spine3",
    "left_foot", "right_foot", "neck",
    "left_collar", "right_collar", "head",
    "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow",
    "left_wrist", "right_wrist",
]
PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19]
LEFT_WRIST = JOINTS.index("left_wrist")
RIGHT_WRIST = JOINTS.index("right_wrist")


def other_side(name):
    """"left_knee" -> "right_knee" and back; "head" stays."""
    if name.startswith("left"):
        return name.replace("left", "right")
    return name.replace("right", "left")


MIRROR = [JOINTS.index(other_side(name)) for name in JOINTS]


# ---- 4. Rotations --------------------------------------------------------------------------------
Z_UP_TO_Y_UP = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # AMASS -> ours


def aa_to_matrix(aa):
    """Axis-angle (...,3), radians -> rotation matrices (...,3,3), by Rodrigues' formula."""
    angle = torch.linalg.vector_norm(aa, dim=-1)[..., None, None]             # (...,1,1)
    x, y, z = aa.unbind(-1)
    zero = torch.zeros_like(x)
    rows = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1)           # (...,9)
    cross = rows.unflatten(-1, (3, 3))  # cross @ v = aa x v

    # torch.sinc(t) is sin(pi t) / (pi t) and knows its limit at 0, where sin(t) / t is 0 / 0
    sine = torch.sinc(angle / math.pi)  # sin(angle) / angle
    cosine = 0.5 * torch.sinc(angle / (2 * math.pi)) ** 2  # (1 - cos(angle)) / angle²
    eye = torch.eye(3, dtype=aa.dtype, device=aa.device)
    return eye + sine * cross + cosine * (cross @ cross)                      # (...,3,3)


def rotation_about(axis, angle):
    """Rotation matrices (...,3,3) by angles (...), radians, about axis 0 (x), 1 (y) or 2 (z)."""
    return aa_to_matrix(angle[..., None] * torch.eye(3)[axis])


def matrix_to_quaternion(matrix):
    """Rotation matrices (...,3,3) -> unit quaternions (...,4), w x y z, w >= 0.

    The matrix 4 q qᵀ is linear in R, and each of its rows is a multiple of q. The longest row is
    accurate at any angle; a formula that always starts from w loses the sign near pi.
    """
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = matrix.flatten(-2).unbind(-1)
    entries = [
        1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01,
        m21 - m12, 1 + m00 - m11 - m22, m01 + m10, m02 + m20,
        m02 - m20, m01 + m10, 1 - m00 + m11 - m22, m12 + m21,
        m10 - m01, m02 + m20, m12 + m21, 1 - m00 - m11 + m22,
    ]
    rows = torch.stack(entries, -1).unflatten(-1, (4, 4))                     # (...,4,4)

    longest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]     # (...,1,1)
    row = torch.take_along_dim(rows, longest, dim=-2).squeeze(-2)             # (...,4)
    q = F.normalize(row, dim=-1)
    return torch.where(q[..., :1] < 0, -q, q)  # q and -q are the same rotation


def matrix_to_aa(matrix):
    """Rotation matrices (...,3,3) -> axis-angle (...,3), angle in [0, pi]."""
    # w is cos(angle / 2), xyz is sin(angle / 2) times the axis
    w, xyz = matrix_to_quaternion(matrix).split([1, 3], -1)                   # (...,1), (...,3)
    sine = torch.linalg.vector_norm(xyz, dim=-1, keepdim=True)
    is_tiny = sine < 1e-7

    # angle / sine tends to 2; dividing by 1 there keeps nan out of the gradient of the other branch
    ratio = 2 * torch.atan2(sine, w) / torch.where(is_tiny, 1.0, sine)
    return xyz * torch.where(is_tiny, 2.0, ratio)


def matrix_to_sixd(matrix):
    """(...,3,3) -> 6D (...,6): the first two ROWS, as in the official release.

    Six numbers are continuous in the rotation, three cannot be. Other code bases keep columns.
    """
    return matrix[..., :2, :].flatten(-2)


def sixd_to_matrix(sixd):
    """6D (...,6), any two rows -> (...,3,3): Gram-Schmidt, and the cross product as third row."""
    row1, row2 = sixd.split([3, 3], -1)                                       # (...,3) each
    row1 = F.normalize(row1, dim=-1)
    row2 = row2 - (row1 * row2).sum(-1, keepdim=True) * row1
    row2 = F.normalize(row2, dim=-1)
    row3 = torch.linalg.cross(row1, row2)
    return torch.stack([row1, row2, row3], -2)


def mirror(rotmat):
    """The mirror image of a pose (...,22,3,3): left and right joints swap, R -> M R M."""
    sign = torch.tensor([-1.0, 1.0, 1.0], dtype=rotmat.dtype, device=rotmat.device)
    # M = diag(sign): multiplying by M is multiplying rows, or columns, by the signs
    return rotmat[..., MIRROR, :, :] * sign[:, None] * sign


def turn_root(rotmat, turn):
    """Turns the whole person: rotmat (...,22,3,3) with turn (...,3,3) applied to its root."""
    root = turn.to(rotmat)[..., None, :, :] @ rotmat[..., :1, :, :]           # (...,1,3,3)
    return torch.cat([root, rotmat[..., 1:, :, :]], -3)


def face_front(rotmat, like=None):
    """Turns poses (M,22,3,3) about +y by minus their heading, or by minus the heading of `like`.

    The heading is the direction of the person's left: as in PoseScript, the last Euler angle of the
    root in AMASS's z-up frame. It jumps by half a turn for people who lie on their side.
    """
    root = (rotmat if like is None else like)[:, 0]                           # (M,3,3)
    left = root[:, :, 0]                                                      # (M,3)
    heading = torch.atan2(-left[:, 2], left[:, 0])  # our (x, -z) is (x, y) where z is up
    return turn_root(rotmat, rotation_about(1, -heading))


def global_transforms(rotmat, rest):
    """rotmat (...,22,3,3), rest joints (22,3) -> rotations in the body frame, joints (...,22,3).

    The pelvis stays at its place in rest.
    """
    rotations = [rotmat[..., 0, :, :]]
    joints = [rest[0].expand(*rotmat.shape[:-3], 3)]
    for joint in range(1, 22):
        parent = PARENTS[joint]
        bone = rest[joint] - rest[parent]
        rotations.append(rotations[parent] @ rotmat[..., joint, :, :])        # (...,3,3)
        joints.append(joints[parent] + rotations[parent] @ bone)              # (...,3)
    return torch.stack(rotations, -3), torch.stack(joints, -2)                # (...,22,3,3|3)


def forward_kinematics(rotmat, rest):
    """rotmat (...,22,3,3), rest (22,3) metres -> joints (...,22,3), pelvis at 0. Differentiable."""
    _, joints = global_transforms(rotmat, rest - rest[0])
    return joints


# ---- 5. The body ---------------------------------------------------------------------------------
# V vertices, F triangles, J joints of the file (24 and more), P pose correctives
BODY_SHAPES = {
    "v_template": ("V", 3),
    "f": ("F", 3),
    "weights": ("V", "J"),
    "J_regressor": ("J", "V"),
    "kintree_table": (2, "J"),
    "posedirs": ("V", 3, "P"),
}


def shape_fits(shape, expected, sizes):
    """Is shape the expected one? sizes holds what each letter stands for; new letters are added."""
    if len(shape) != len(expected):
        return False
    for length, size in zip(shape, expected):
        if isinstance(size, str):
            size = sizes.setdefault(size, length)
        if length != size:
            return False
    return True


def read_body(path):
    """Reads and checks a body file -> its arrays, parents (J,). Raises UserError."""
    arrays = read_arrays(path, BODY_SHAPES)
    sizes = {}
    for name, expected in BODY_SHAPES.items():
        if name not in arrays:
            raise UserError(
                f"{path} holds no {name}: it must be an SMPL, SMPL-H or SMPL-X model file"
            )
        array = arrays[name]
        fits = shape_fits(array.shape, expected, sizes)
        if not fits or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise UserError(
                f"{path} is damaged or not a body model: its {name} is {array.shape} "
                f"{array.dtype}, not {expected} finite numbers that fit the other arrays"
            )

    J, V = sizes["J"], sizes["V"]
    # the entry of the root is 2^32-1 or -1 and never read
    parents = arrays["kintree_table"][0].astype(np.int64)
    has_our_joints = J >= 24 and parents[1:22].tolist() == PARENTS[1:]
    if not has_our_joints or sizes["P"] != 9 * (J - 1):
        raise UserError(
            f"{path} has another skeleton ({J} joints): only SMPL, SMPL-H and SMPL-X can be read"
        )
    bad_faces = arrays["f"].min() < 0 or arrays["f"].max() >= V
    bad_parents = (parents[1:] >= np.arange(1, J)).any()
    if bad_faces or bad_parents:
        raise UserError(f"{path} is damaged: it refers to vertices or joints that it does not have")
    return arrays, parents


def smpl_layout(arrays, parents):
    """Arrays of SMPL, SMPL-H or SMPL-X -> SMPL's own layout of 24 joints, as smplx.SMPL takes it.

    Fingers and face do not move here: all that hangs on a wrist joins SMPL's rigid hand (joints 22
    and 23), jaw and eyes join the head.
    """
    smpl_joint = list(range(22))  # joint of the file -> one of the 24
    for parent in parents[22:]:
        joint = smpl_joint[parent]
        if joint == LEFT_WRIST:
            joint = 22
        elif joint == RIGHT_WRIST:
            joint = 23
        smpl_joint.append(joint)

    V = len(arrays["v_template"])
    weights = np.zeros((V, 24))
    for file_joint, joint in enumerate(smpl_joint):
        weights[:, joint] += arrays["weights"][:, file_joint]
    # any knuckle may give the position of a hand, since hands do not bend
    first = [smpl_joint.index(joint) for joint in range(24)]
    posedirs = np.zeros((V, 3, 207))
    posedirs[:, :, :189] = arrays["posedirs"][:, :, :189]  # 9 for each of 21 joints; 0 for hands

    return {
        "v_template": arrays["v_template"],
        "f": arrays["f"].astype(np.int64),
        "weights": weights,
        "J_regressor": arrays["J_regressor"][first],
        "posedirs": posedirs,
        "shapedirs": np.zeros((V, 3, 10)),  # betas are always 0, the mean shape
        "kintree_table": np.array([PARENTS + [LEFT_WRIST, RIGHT_WRIST], range(24)]),
    }


def vertex_area(template, faces):
    """The area around each vertex (V,): its triangles' areas, scaled to 0..1 each, summed."""
    a, b, c = template[faces].unbind(1)                                       # (F,3) each
    areas = torch.linalg.cross(b - a, c - a).norm(dim=-1)                     # (F,)
    areas = (areas - areas.min()) / (areas.max() - areas.min())
    total = torch.zeros_like(template[:, 0])                                  # (V,)
    return total.index_add_(0, faces.flatten(), areas.repeat_interleave(3))


class Body(nn.Module):
    """A skinned human of mean shape, posed by 22 rotations.

    rest (22,3) and template (V,3): joints and vertices of the T-pose, relative to the pelvis; faces
    (F,3); weights (V,24), which joints move which vertex; area (V,), see vertex_area. is_free: its
    mesh may be given away.
    """

    def __init__(self, arrays, name="", is_free=False):
        super().__init__()
        import smplx  # here, because it is slow to import and few commands need a body

        # smplx wants the ids of five vertices of the face; nothing here reads these points
        face = dict.fromkeys(["nose", "reye", "leye", "rear", "lear"], 0)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints remarks on shape coefficients
            self.smpl = smplx.SMPL(
                "",
                data_struct=smplx.utils.Struct(**arrays),
                vertex_ids=face,
                use_hands=False,
                use_feet_keypoints=False,
            )
        self.smpl.requires_grad_(False)
        self.name = name
        self.is_free = is_free

        rest = arrays["J_regressor"] @ arrays["v_template"]                   # (24,3)
        constants = {
            "rest": rest[:22] - rest[0],
            "template": arrays["v_template"] - rest[0],
            "weights": arrays["weights"],
            "posedirs": arrays["posedirs"][:, :, :189],
        }
        # not persistent: a checkpoint must not contain a licensed body
        for key, array in constants.items():
            tensor = torch.as_tensor(array, dtype=torch.float32)
            self.register_buffer(key, tensor, persistent=False)
        self.register_buffer("faces", torch.as_tensor(arrays["f"]), persistent=False)
        area = vertex_area(self.template, self.faces)
        self.register_buffer("area", area, persistent=False)

    def forward(self, rotmat, vertex_ids=None):
        """rotmat (B,22,3,3) -> joints (B,22,3), vertices (B,V,3), in metres, pelvis at 0.

        smplx poses all vertices; `skin` poses only the vertices vertex_ids (n,), if given.
        """
        if vertex_ids is not None:
            return self.skin(rotmat, vertex_ids)
        B = len(rotmat)
        hands = torch.eye(3, dtype=rotmat.dtype, device=rotmat.device).expand(B, 2, 3, 3)
        posed = self.smpl(
            global_orient=rotmat[:, :1],
            body_pose=torch.cat([rotmat[:, 1:], hands], 1),
            betas=rotmat.new_zeros(B, 10),
            pose2rot=False,
        )
        pelvis = posed.joints[:, :1]                                          # (B,1,3)
        return posed.joints[:, :22] - pelvis, posed.vertices - pelvis

    def joints(self, rotmat):
        """rotmat (...,22,3,3) -> joints (...,22,3), much faster than posing the vertices too."""
        return forward_kinematics(rotmat, self.rest)

    def skin(self, rotmat, vertex_ids):
        """Linear blend skinning: rotmat (B,22,3,3), vertex_ids (n,) -> joints, vertices (B,n,3).

        The numbers of smplx (SMPL paper, equations 2-9) for training steps in which all vertices
        would take too long.
        """
        rotations, joints = global_transforms(rotmat, self.rest)              # (B,22,3,3|3)

        # pose correctives are linear in the rotations' difference from the T-pose
        eye = torch.eye(3, device=rotmat.device)
        pose_features = (rotmat[:, 1:] - eye).flatten(1)                      # (B,189)
        posedirs = self.posedirs[vertex_ids]                                  # (n,3,189)
        offsets = torch.einsum("bp,nkp->bnk", pose_features, posedirs)        # (B,n,3)
        vertices = self.template[vertex_ids] + offsets                        # (B,n,3)

        weights = self.weights[vertex_ids, :22].clone()                       # (n,22)
        weights[:, 20:] += self.weights[vertex_ids, 22:]  # rigid hands move with the wrists

        # joint j moves a point x to R_j x + t_j; a vertex moves by the weighted mean of R and t
        rest = self.rest[:, :, None]                                          # (22,3,1)
        translations = joints - (rotations @ rest).squeeze(-1)                # (B,22,3)
        blended = torch.einsum("nj,bjkl->bnkl", weights, rotations)           # (B,n,3,3)
        vertices = (blended @ vertices[..., None]).squeeze(-1)                # (B,n,3)
        return joints, vertices + weights @ translations


def load_body(path=""):
    """Loads a body. Raises UserError.

    path: an SMPL .pkl or .npz, or an SMPL-H or SMPL-X .npz; "": the free body in assets/.
    """
    free = ASSETS / "body.npz"
    path = pathlib.Path(path or free)
    arrays, parents = read_body(path)
    return Body(smpl_layout(arrays, parents), path.stem, path.samefile(free))


# ---- 6. Shared by all scripts: user errors, flags, files -----------------------------------------
class UserError(Exception):
    """A mistake of the user, in one sentence: what is wrong, where, and what to do about it."""


def first_line(error):
    """The first line of an exception's message, since some libraries raise whole paragraphs."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    message = str(error) or type(error).__name__
    return message.splitlines()[0][:200]  # libraries quote what they found, at any length


@contextlib.contextmanager
def as_user_error(before, after=""):
    """Re-raises any exception as a UserError: `before`, its reason, `after`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(before + first_line(error) + after) from error


@contextlib.contextmanager
def skip_bad_entry(skipped, where):
    """Records the exception of a bad entry of a data set in the list `skipped` and continues."""
    try:
        yield
    except Exception as error:
        skipped.append(f"{where}: {first_line(error)}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a wrong command line raises a UserError instead of exiting."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def cli(Config, argv=None):
    """Parses argv (None: the command line) into the dataclass Config. Raises UserError.

    A field is a flag, the comment on its line is its help. bool: --x or --no-x; list[str]: repeat
    the flag. `--help` also shows the docstring of Config and the commands in that of its module.
    """
    module_doc = sys.modules[Config.__module__].__doc__ or ""
    commands = re.findall(r"^    (?:python|torchrun) .*", module_doc, re.M)
    parser = ArgumentParser(
        description=inspect.cleandoc(Config.__doc__),
        epilog="\n".join(["examples:", *commands]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # comments exist only in the source
    comments = dict(re.findall(r"^ +(\w+):[^#\n]*#(.*)", inspect.getsource(Config), re.M))
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        add_flag(parser, field.name, types[field.name], field.default, comments.get(field.name, ""))

    # argparse's own error for an unknown flag has no suggestion
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = ["--" + field.name for field in dataclasses.fields(Config)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown argument {unknown[0]}: {hint}(--help lists the flags)")

    config = Config(**vars(known))
    if not 0 <= getattr(config, "seed", 0) < 2 ** 32:
        raise UserError(f"--seed {config.seed} must be from 0 to {2 ** 32 - 1}")
    return config


def add_flag(parser, name, kind, default, comment):
    """Adds one field of a Config to the parser; a flag that is not given keeps its default."""
    flags = ["--" + name]
    # --pose-vit for --pose_vit; not for a bool, whose help would list four spellings
    if kind is not bool and "_" in name:
        flags.append("--" + name.replace("_", "-"))

    text = comment.strip().replace("%", "%%")  # argparse reads % as a format
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    elif typing.get_origin(kind) is list:
        options = {"action": "append", "metavar": "X"}
        text += " (may be repeated)"
    else:
        options = {"type": kind, "metavar": kind.__name__.upper()}
    # the default of a list is a factory, which dataclasses mark as MISSING
    if default not in ("", None, dataclasses.MISSING):
        text += f" [{default}]"
    parser.add_argument(*flags, help=text, default=argparse.SUPPRESS, **options)


def run_main(main):
    """Runs main(). A UserError or an OSError becomes one line on stderr and exit code 2."""
    try:
        main()
    except BrokenPipeError:
        # the reader of a pipe (`| head`) has closed it; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        where = error.filename or "the output"
        print(f"error: {where}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what a shell expects after Ctrl-C


def delete(path):
    """Deletes a file or a folder, if it is there and if that is allowed."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as new:` write to the file `new`; it becomes `path` when complete.

    After any error `path` is as it was, and no half-written file is left; a process that is killed
    leaves the folder `.PID-NAME`, see `delete_leftovers`. Raises UserError if `path` is a folder or
    cannot be written.
    """
    path = pathlib.Path(path)
    if os.path.isdir(path) or not path.name:
        raise UserError(f"{path} is a folder: name a file")
    # beside `path`, because a rename cannot cross disks; a folder, because safetensors writes to
    # yet another temporary file, beside the one that it is given
    folder = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        delete(folder)  # of a killed process that had the same number
        folder.mkdir(parents=True)
        new = folder / path.name
        yield new
        # safetensors makes files that only their owner may read; the folder has the usual mode
        new.chmod(folder.stat().st_mode & 0o666)
        os.replace(new, path)
    except BaseException as error:  # Ctrl-C, too
        # safetensors and torch.save report a full disk by exceptions of their own
        if isinstance(error, OSError) or re.search("os error|enforce fail|iostream", str(error)):
            raise UserError(explain_write_error(path, error)) from error
        raise
    finally:
        delete(folder)


def explain_write_error(path, error):
    """The sentence for a file that could not be written."""
    reason = getattr(error, "strerror", None) or first_line(error)
    advice = "choose another place"
    if re.search("space|quota|too large|written|fail", reason, re.IGNORECASE):  # numpy: 0 written
        advice = "free some space or " + advice
    return f"cannot write {path}: {reason}; {advice}"


def delete_leftovers(folder, names):
    """Deletes what processes that were killed in atomic_write left of the files `names`."""
    for path in pathlib.Path(folder).glob(".*-*"):
        match = re.fullmatch(r"\.(\d{1,9})-(.+)", path.name)
        if match and match[2] in names and not is_running(int(match[1])):
            delete(path)


def is_running(pid):
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)  # signal 0 is not delivered
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def validate_writable(flag, path):
    """Raises UserError if a file could not be written at `path`; see `validate_folder`."""
    path = pathlib.Path(path)
    if path.is_dir() or not path.name:
        raise UserError(f"{flag} {path} is a folder: name a file")
    validate_folder(flag, path.parent)


def validate_folder(flag, folder):
    """Raises UserError if nothing could be written to a folder, which need not exist yet.

    To be called before long work, which would be lost at its end. Permissions alone do not tell, so
    a temporary file is made.
    """
    parent = pathlib.Path(folder)
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{flag} {folder}: {parent} is a file; choose another folder")
    with as_user_error(f"{flag} {folder} cannot be written (", "); choose another folder"):
        tempfile.TemporaryFile(dir=parent).close()


def progress_bar(rows, name, is_off=False):
    """Iterates over rows with a progress bar on standard error.

    There is none if standard error is no terminal, if TQDM_DISABLE is set, or if is_off.
    """
    from tqdm import tqdm
    is_off = is_off or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    disable = True if is_off else None  # None: unless standard error is a terminal
    return tqdm(rows, desc=name, leave=False, dynamic_ncols=True, disable=disable)


def list_files(path, *suffixes):
    """The file itself, or all files below a folder that end in one of the suffixes, in order."""
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)


def require_file(path):
    """Raises UserError unless `path` is a file that may be read: no folder, pipe or device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}; check the path") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} cannot be read: it is a folder, a pipe or a device; name a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: permission denied; its owner must allow it")


MAX_JSON = 2 ** 30  # bytes


def load_json(path):
    """The content of a JSON file. Raises UserError."""
    require_file(path)
    if os.path.getsize(path) > MAX_JSON:
        raise UserError(f"{path} is larger than {MAX_JSON:,} bytes; is it JSON?")
    with as_user_error(f"{path} is not a complete JSON file (", "); copy or write it again"):
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def read_json(path):
    """A file with a JSON object -> dict. Raises UserError."""
    content = load_json(path)
    if type(content) is not dict:
        raise UserError(f"{path} holds no JSON object; copy or write it again")
    return content


@functools.cache
def load_asset(name):
    """The table assets/NAME.json. All callers share one copy: do not change it."""
    return load_json(ASSETS / f"{name}.json")


# A pickle is a program for a small stack machine, and the usual machine calls any function that the
# program names. Ours calls none: it records what is to be called with what, and `to_array` makes an
# array of such a record once everything in it has been checked.
MAX_BYTES = 2 ** 30  # in a pickle, and unpacked from an .npz
MAX_OPCODES = 500_000  # in a pickle; a body file has a few hundred, a torch file 60 per tensor
MAX_MARKS = 10_000  # lists in each other while a pickle is read; its writers stop at about 1,000
MAX_DENSE = 2 ** 20  # numbers in a sparse matrix made dense; J_regressor has up to 576,125
MAX_REPEATED = 2 ** 20  # numbers in a tensor that has fewer of its own, such as one for all frames
MAX_LIST = 2 ** 14  # numbers in nested lists, if nothing else is said
MAX_NESTING = 4  # of chumpy objects; also the most dimensions that lists may have
MAX_DIMENSIONS = 8
NUMBER_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")

RENAMED_MODULES = {  # their names today -> those in old pickles
    "builtins": "__builtin__",
    "copyreg": "copy_reg",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "scipy.sparse._csc": "scipy.sparse.csc",
}
ALLOWED = {  # what arrays name in their pickles -> what we call its Record
    "numpy.ndarray": "class",
    "numpy.dtype": "dtype",
    "numpy.core.multiarray._reconstruct": "array",
    "numpy.core.multiarray.scalar": "scalar",
    "numpy.core.numeric._frombuffer": "buffer",
    "joblib.numpy_pickle.NumpyArrayWrapper": "joblib array",
    "scipy.sparse.csc.csc_matrix": "sparse matrix",
    "chumpy.ch.Ch": "chumpy array",
    "chumpy.reordering.Select": "chumpy selection",
    # dicts of other kinds, and what the second one makes of a missing entry
    "collections.OrderedDict": "dict",
    "collections.defaultdict": "dict",
    "__builtin__.dict": "class",
    "__builtin__.list": "class",
    # how bytes and objects are written in the pickle protocols of Python 2
    "_codecs.encode": "bytes",
    "__builtin__.bytes": "bytes",
    "copy_reg._reconstructor": "reconstructor",
    "__builtin__.object": "class",
    "__builtin__.set": "set",
}


class FileError(Exception):
    """What is wrong with a file that is damaged, foreign or hostile, in our words."""


@contextlib.contextmanager
def file_errors(message):
    """Raises a FileError that says `message` in the place of any exception of another kind."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise FileError(message) from error


class Record(dict):
    """What a pickle calls: a name and its arguments, then the state that the result is to get.

    arguments: None if the name is only mentioned. A dict, because some objects get items as well.
    """

    __slots__ = ("name", "arguments", "state")

    def __init__(self, name, arguments=None):
        self.name = name
        self.arguments = arguments
        self.state = None


class SafeUnpickler(pickle._Unpickler):
    """Reads a pickle into numbers, text, bytes, lists, tuples, dicts and Records; calls nothing.

    Based on Python's unpickler in Python, since the one in C believes every length that it reads
    and asks for the memory first. Names outside of `allowed` raise a FileError.
    """

    # instructions that do no more than put values on the stack and into the memo; the rest is
    # defined below or refused
    HARMLESS = (
        pickle.PROTO + pickle.POP + pickle.POP_MARK + pickle.DUP
        + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE
        + pickle.INT + pickle.BININT + pickle.BININT1 + pickle.BININT2
        + pickle.LONG + pickle.LONG1 + pickle.FLOAT + pickle.BINFLOAT
        + pickle.STRING + pickle.BINSTRING + pickle.SHORT_BINSTRING
        + pickle.UNICODE + pickle.BINUNICODE + pickle.SHORT_BINUNICODE + pickle.BINUNICODE8
        + pickle.BINBYTES + pickle.SHORT_BINBYTES + pickle.BINBYTES8
        + pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
        + pickle.EMPTY_LIST + pickle.LIST + pickle.APPEND + pickle.APPENDS + pickle.EMPTY_DICT
        + pickle.GET + pickle.BINGET + pickle.LONG_BINGET
        + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE
        + pickle.GLOBAL + pickle.STACK_GLOBAL + pickle.BINPERSID
    )
    dispatch = {code: pickle._Unpickler.dispatch[code] for code in HARMLESS}

    def __init__(self, file, allowed=ALLOWED):
        super().__init__(file, encoding="latin1")  # text of Python 2, some of which is bytes
        self.read = file.read
        self.readline = file.readline
        self.allowed = allowed

    def load(self):
        """The object in the pickle. Raises exceptions of any kind, see file_errors."""
        self.metastack = []
        self.stack = []
        self.append = self.stack.append
        for _ in range(MAX_OPCODES):
            code = self.read(1)
            if code == pickle.STOP:
                return self.stack.pop()
            if not code:
                raise FileError("it ends too early")
            carry_out = self.dispatch.get(code[0])
            if carry_out is None:
                raise FileError("it has instructions that no array needs")
            carry_out(self)
        raise FileError(f"it has more than {MAX_OPCODES:,} instructions")

    def find_class(self, module, name):
        """The hook for names: a Record that can be called."""
        path = f"{RENAMED_MODULES.get(module, module)}.{name}"
        if path not in self.allowed:
            asked = ascii(f"{module}.{name}"[:80]).strip("'")
            raise FileError(f"it asks to run {asked}")
        return Record(self.allowed[path])

    def load_mark(self):
        if len(self.metastack) == MAX_MARKS:
            raise FileError("it holds lists too deep in each other")
        super().load_mark()
    dispatch[pickle.MARK[0]] = load_mark

    def load_call(self):
        arguments = self.stack.pop()
        function = self.stack.pop()
        callable_ = type(function) is Record and function.arguments is None
        if not callable_ or type(arguments) is not tuple:
            raise FileError("it calls something that is not a function")
        if function.name == "reconstructor":  # called with a class, its base, and no state
            function = arguments[0]
            arguments = ()
        self.append(Record(function.name, arguments))
    dispatch[pickle.REDUCE[0]] = load_call
    dispatch[pickle.NEWOBJ[0]] = load_call

    def load_build(self):
        state = self.stack.pop()
        record = self.stack[-1]
        if type(record) is not Record or record.arguments is None or record.state is not None:
            raise FileError("it gives a state to something that takes none")
        record.state = state
        if record.name == "joblib array":
            record.arguments = self.read_joblib_numbers(state)
    dispatch[pickle.BUILD[0]] = load_build

    def read_joblib_numbers(self, state):
        """joblib writes the bytes of an array behind its description, in the midst of a pickle."""
        n_bytes = count_bytes(to_dtype(state["dtype"]), state["shape"])
        if state.get("numpy_array_alignment_bytes"):  # joblib 1.2 and newer
            n_padding = self.read(1)[0]
            self.read(n_padding)
        return self.read(n_bytes)

    def set_items(self, items):
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise FileError("it puts items into something that is not a dict")
        for key, value in zip(items[::2], items[1::2]):
            # Only text, and numbers of people, are ever looked up. The hash of nested tuples can
            # take years, and many large numbers can have the same.
            if type(key) is str or (type(key) is int and 0 <= key < 2 ** 32):
                target[key] = value

    def load_setitem(self):
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_items([key, value])
    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self):
        self.set_items(self.pop_mark())
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self.set_items(items)
    dispatch[pickle.DICT[0]] = load_dict

    def load_put(self):
        index = int(self.readline())
        if not 0 <= index < 2 ** 32:  # of larger ones, many could have the same hash
            raise FileError("its memo is too large")
        self.memo[index] = self.stack[-1]
    dispatch[pickle.PUT[0]] = load_put

    def load_frame(self):
        self.read(8)  # a length for buffered reading
    dispatch[pickle.FRAME[0]] = load_frame

    # sets become lists, which hash nothing, and bytearrays bytes, which are not allocated unseen
    dispatch[pickle.EMPTY_SET[0]] = pickle._Unpickler.load_empty_list
    dispatch[pickle.FROZENSET[0]] = pickle._Unpickler.load_list
    dispatch[pickle.ADDITEMS[0]] = pickle._Unpickler.load_appends
    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8


def load_pickle(data):
    """The bytes of a pickle -> its object, see SafeUnpickler. Raises FileError."""
    with file_errors("it is damaged"):
        return SafeUnpickler(io.BytesIO(data)).load()


def read_pickle(path):
    """The object in a pickle file, see SafeUnpickler. Raises FileError.

    Also one of joblib, as it is or with its usual compression, that of zlib.
    """
    if os.path.getsize(path) > MAX_BYTES:
        raise FileError(f"it is larger than {MAX_BYTES:,} bytes")
    content = pathlib.Path(path).read_bytes()
    if content.startswith(b"x"):  # as zlib begins, and no pickle
        with file_errors("it is damaged"):
            content = zlib.decompressobj().decompress(content, MAX_BYTES)
    return load_pickle(content)


def to_array(value):
    """A value of load_pickle -> an array of numbers. Raises FileError if it is none."""
    with file_errors("it holds a damaged array"):
        return record_to_array(value)


def record_to_array(value, nesting=0):
    """The work of to_array. nesting: how many chumpy objects surround the value."""
    if nesting > MAX_NESTING:
        raise FileError("it holds arrays inside of arrays")
    if type(value) is not Record:
        return list_to_array(value)

    if value.name == "array":
        shape, dtype, is_fortran, data = value.state[-4:]  # after a version, which is always 1
        return build_array(data, to_dtype(dtype), shape, "F" if is_fortran else "C")
    if value.name == "buffer":
        data, dtype, shape, order, *axes = value.arguments
        if order == "K":  # a transposed array and how to transpose it
            return build_array(data, to_dtype(dtype), shape).transpose(*axes)
        return build_array(data, to_dtype(dtype), shape, order)
    if value.name == "joblib array":
        layout = value.state
        return build_array(
            value.arguments, to_dtype(layout["dtype"]), layout["shape"], layout["order"])
    if value.name == "scalar":
        dtype, data = value.arguments
        return build_array(data, to_dtype(dtype), ())
    if value.name == "sparse matrix":
        return sparse_to_array(value.state)
    if is_tensor(value):
        return map_tensor(value).double().numpy()  # numpy knows no bfloat16
    if value.name == "chumpy array":
        return record_to_array(value.state["x"], nesting + 1)
    if value.name == "chumpy selection":
        elements = record_to_array(value.state["a"], nesting + 1).ravel()
        indices = record_to_array(value.state["idxs"], MAX_NESTING)
        shape = record_to_array(value.state["preferred_shape"], MAX_NESTING)
        return elements[indices].reshape(shape.tolist())
    raise FileError(f"it holds a {value.name} in the place of an array")


def list_to_array(value, most=MAX_LIST):
    """A number, or evenly nested lists of at most `most` numbers -> their array."""
    shape = []
    level = [value]  # everything at one depth; a list may occur many times in it
    while level and isinstance(level[0], (list, tuple)):
        shape.append(len(level[0]))
        for row in level:
            if not isinstance(row, (list, tuple)) or len(row) != shape[-1]:
                raise FileError("it holds lists of different lengths")
        if len(shape) > MAX_NESTING or math.prod(shape) > most:
            raise FileError("it holds lists of too many numbers")
        level = list(itertools.chain.from_iterable(level))

    numbers = []
    for number in level:
        if type(number) is Record and number.name == "scalar":
            number = record_to_array(number).item()
        if type(number) not in (bool, int, float):
            raise FileError("it holds something else in the place of a number")
        numbers.append(number)
    array = np.array(numbers).reshape(shape)
    if array.dtype.kind not in "biuf":  # integers of more than 64 bits
        raise FileError("it holds a number that is too large")
    return array


def to_dtype(record):
    """The Record of a dtype -> the dtype, if it is one of plain numbers."""
    code, *_ = record.arguments
    _, byte_order, *rest = record.state
    # no parts, no names, no fields; size, alignment and flags as the code implies them
    is_plain = record.name == "dtype" and rest == [None, None, None, -1, -1, 0]
    if not is_plain or code not in NUMBER_CODES or byte_order not in ("<", ">", "|", "="):
        raise FileError("it holds an array of something else than plain numbers")
    return np.dtype(byte_order + code)


def count_bytes(dtype, shape):
    """The size of an array, with integers that cannot overflow. Raises FileError."""
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        raise FileError("it holds an array without a proper shape")
    for length in shape:
        if type(length) is not int or not 0 <= length <= MAX_BYTES:
            raise FileError("it holds an array of an impossible shape")
    return math.prod(shape) * dtype.itemsize


def build_array(data, dtype, shape, order="C"):
    """Bytes -> a new array, in the byte order of this machine. order: "C", or "F" for Fortran."""
    if type(data) is Record and data.name == "bytes":
        data, *_ = data.arguments or [b""]
    # text holds bytes as latin1; its length is checked before it is copied
    if type(data) not in (bytes, str) or len(data) != count_bytes(dtype, shape):
        raise FileError("it holds an array whose bytes do not fit its shape")
    if type(data) is str:
        data = data.encode("latin1")
    array = np.frombuffer(data, dtype).reshape(shape, order=order)
    return array.astype(dtype.newbyteorder("="))


def sparse_to_array(state):
    """The state of scipy's csc_matrix, a matrix column by column -> the dense matrix."""
    data = record_to_array(state["data"], MAX_NESTING)                        # (n,)
    rows = record_to_array(state["indices"], MAX_NESTING).astype(np.int64)    # (n,)
    ends = record_to_array(state["indptr"], MAX_NESTING).astype(np.int64)     # (columns+1,)
    shape = list_to_array(state.get("_shape", state.get("shape"))).tolist()
    n_rows, n_columns = shape
    if min(shape) < 0 or n_rows * n_columns > MAX_DENSE:
        raise FileError("it holds a sparse matrix that is too large")

    lengths = np.diff(ends)                                                   # (columns,)
    fits = data.shape == rows.shape and ends.shape == (n_columns + 1,)
    if not fits or ends[0] != 0 or ends[-1] != len(rows) or (ends[1:] < ends[:-1]).any():
        raise FileError("it holds a damaged sparse matrix")
    if (rows < 0).any() or (rows >= n_rows).any():
        raise FileError("it holds a sparse matrix with numbers outside of it")
    dense = np.zeros(shape)
    columns = np.repeat(np.arange(n_columns), lengths)                        # (n,)
    np.add.at(dense, (rows, columns), data)
    return dense


def to_element(value):
    """A pickled object array -> its element if the shape is (), else the list of its elements.

    Other values are returned as they are.
    """
    if type(value) is Record and value.name == "array" and type(value.state) is tuple:
        shape, _, _, elements = value.state[-4:]
        if type(elements) is list:
            return elements[0] if shape == () else elements
    return value


# A torch file is a pickle, and the numbers of its tensors behind it: in another member of a zip, or
# before torch 1.6 later in the file. The pickle only refers to them. torch.load(weights_only=True)
# executes no foreign code either, but an 80-byte file makes it hash nested tuples for years, and
# another one allocate all memory.
STORAGES = {  # what a torch file calls an array of numbers, by their type
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
TENSORS = {  # what makes a tensor of it
    "torch._utils._rebuild_tensor": "tensor",
    "torch._utils._rebuild_tensor_v2": "tensor",
    "torch._utils._rebuild_parameter": "parameter",
}
BESIDE_TENSORS = (  # data that checkpoints hold as well: recorded, and never looked at
    "__builtin__.bool", "__builtin__.int", "__builtin__.float", "__builtin__.complex",
    "__builtin__.str", "__builtin__.unicode", "__builtin__.bytearray", "__builtin__.frozenset",
    "__builtin__.tuple", "collections.Counter",
    "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    "argparse.Namespace", "yacs.config.CfgNode", "typing.Any",
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode",
    "torch.Size", "torch.device", "torch._utils._rebuild_tensor_v3",
    "torch.uint16", "torch.uint32", "torch.uint64", *map(str, STORAGES.values()),
)
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # begins a torch file that is no zip


class TorchUnpickler(SafeUnpickler):
    """Reads the pickle in a torch file.

    storages: {key of an array of numbers in the file: its Record, whose arguments are their type}.
    Its state is to become their bytes.
    """

    def __init__(self, file):
        allowed = ALLOWED | TENSORS | {path: path for path in STORAGES}
        super().__init__(file, allowed | dict.fromkeys(BESIDE_TENSORS, "foreign object"))
        self.storages = {}

    def persistent_load(self, reference):
        """The hook for references: ("storage", type, key, device, length)."""
        kind, key = reference[1:3]
        if type(key) is not str:
            raise FileError("it refers to numbers without a name")
        if key not in self.storages:
            self.storages[key] = Record("storage", STORAGES[kind.name])
        return self.storages[key]


def cut_out(file_bytes, start, n_bytes):
    """n_bytes of a mapped file, from the byte `start` on. Raises FileError if it is short."""
    if not 0 <= start <= start + n_bytes <= len(file_bytes):
        raise FileError("it is cut off")
    return file_bytes[start:start + n_bytes]


def read_zipped(file, file_bytes):
    """The object in a torch file that is a zip. file_bytes: the same file, mapped."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
    path = next(name for name in members if name.endswith("/data.pkl"))
    if members[path].file_size > MAX_BYTES:
        raise FileError(f"its pickle is larger than {MAX_BYTES:,} bytes")

    def content_of(name):
        member = members[name]
        if member.compress_type != zipfile.ZIP_STORED:
            raise FileError("it is compressed")
        # the content follows a header of 30 bytes, whose last 4 are the lengths of what is between:
        # the name and an extra field
        header = cut_out(file_bytes, member.header_offset, 30).numpy()
        lengths = header[26:].view("<u2").tolist()
        return cut_out(file_bytes, member.header_offset + 30 + sum(lengths), member.file_size)

    unpickler = TorchUnpickler(io.BytesIO(content_of(path).numpy()))
    content = unpickler.load()
    for key, storage in unpickler.storages.items():
        storage.state = content_of(path.removesuffix(".pkl") + "/" + key)
    return content


def read_unzipped(file, file_bytes):
    """The same of a file of torch before 1.6: pickles, then a length and numbers per storage."""
    if SafeUnpickler(file).load() != TORCH_MAGIC:
        raise FileError("it is no torch file")
    SafeUnpickler(file).load()  # the version of the format
    SafeUnpickler(file).load()  # the machine that wrote it
    unpickler = TorchUnpickler(file)
    content = unpickler.load()

    for key in SafeUnpickler(file).load():
        if type(key) is not str:
            raise FileError("it holds numbers without a name")
        storage = unpickler.storages[key]
        n_bytes = int.from_bytes(file.read(8), "little") * storage.arguments.itemsize
        storage.state = cut_out(file_bytes, file.tell(), n_bytes)
        file.seek(n_bytes, os.SEEK_CUR)
    return content


def read_torch_file(path):
    """The object in a torch file, see SafeUnpickler. Raises FileError.

    Its tensors are Records: `map_tensor` and `to_array` make them, and only then are their numbers
    read.
    """
    with open(path, "rb") as file, file_errors("it is damaged or cut off"):
        n_bytes = os.path.getsize(path)
        file_bytes = torch.from_file(str(path), size=n_bytes, dtype=torch.uint8)
        if zipfile.is_zipfile(file):
            return read_zipped(file, file_bytes)
        # a file itself would ask for as much memory as a pickle claims to need
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return read_unzipped(mapped, file_bytes)


def is_tensor(value):
    """Whether a value of a torch file is the Record of a tensor."""
    return type(value) is Record and value.name in TENSORS.values()


def map_tensor(record):
    """The Record of a tensor -> the tensor, whose numbers stay in the mapped file.

    Raises exceptions of any kind.
    """
    if record.name == "parameter":
        record = record.arguments[0]
    storage, offset, shape, strides = record.arguments[:4]
    if record.name != "tensor" or storage.name != "storage":
        raise FileError("it holds a damaged tensor")
    dtype = storage.arguments
    numbers = storage.state

    n_bytes = count_bytes(dtype, shape)  # which checks the shape
    if any(type(number) is not int for number in (offset, *strides)):
        raise FileError("it holds a damaged tensor")
    reach = offset  # the index of the last number
    for length, stride in zip(shape, strides, strict=True):
        reach += (length - 1) * stride
    is_inside = min(offset, *strides, 0) == 0 and (reach + 1) * dtype.itemsize <= len(numbers)
    if not is_inside or n_bytes > max(len(numbers), MAX_REPEATED * dtype.itemsize):
        raise FileError("it holds a tensor that is larger than its numbers")

    # as in old files; memory cannot be read as numbers from there
    if numbers.storage_offset() % dtype.itemsize:
        numbers = numbers.clone()
    numbers = numbers.view(dtype)
    return numbers.as_strided(shape, strides, numbers.storage_offset() + offset)


def read_npy(file, size):
    """The array in an open .npy file of `size` bytes. Raises exceptions of any kind."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)

    is_text = dtype.kind in "SU" and dtype.itemsize > 0
    if not is_text and dtype.str[1:] not in NUMBER_CODES:
        raise FileError(f"it holds an array of {dtype.name}, not of numbers or text")
    n_bytes = count_bytes(dtype, shape)
    if n_bytes > size:  # before any memory is asked for
        raise FileError("it is shorter than its array")
    return build_array(file.read(n_bytes), dtype, shape, "F" if is_fortran else "C")


def read_npz(file, names):
    """The arrays `names` in an open .npz file -> {name: array}. Raises exceptions of any kind."""
    arrays = {}
    n_bytes = 0  # of all arrays together
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        for name in names:
            member = members.get(f"{name}.npy")
            if member is None:
                continue
            n_bytes += member.file_size  # zipfile unpacks no more than this
            if n_bytes > MAX_BYTES:
                raise FileError(f"its arrays have more than {MAX_BYTES:,} bytes")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise FileError("it is packed in a way that numpy does not use")
            with archive.open(member) as unpacked:
                arrays[name] = read_npy(unpacked, member.file_size)
    return arrays


def read_arrays(path, names):
    """The arrays `names` that a .npz or an SMPL .pkl holds -> {name: array}. Raises UserError.

    A .npy file gives its array under the name "". Names that the file does not have are left out.
    Nothing in the file is executed, and entries that are not in `names` are not decoded.
    """
    path = pathlib.Path(path)
    if not path.is_file():  # a device or a pipe may never end
        raise UserError(f"no file {path}: check the path")
    hint = ". Is it a complete .npz, .npy or .pkl file of plain arrays?"
    where = f"cannot read {path}: "
    with as_user_error(where, hint), open(path, "rb") as file, file_errors("it is damaged"):
        if path.suffix.lower() == ".pkl":
            entries = read_pickle(path)
            if not isinstance(entries, dict):
                raise FileError("it holds no arrays that have names")
            return {name: to_array(entries[name]) for name in names if name in entries}

        start = file.read(len(np.lib.format.MAGIC_PREFIX))
        file.seek(0)
        if start[:2] == b"PK":  # a zip
            return read_npz(file, names)
        if start != np.lib.format.MAGIC_PREFIX:
            raise FileError("it is no file of numpy")
        return {"": read_npy(file, os.path.getsize(path))}


# A checkpoint of train.py is a folder, and its model.safetensors is all of it: in the header, under
# this name, is a JSON object with the config and the text tokenizer. So one rename replaces them
# together. config.json and tokenizer.json beside it are copies for readers; they count only in
# folders of older versions, whose header has nothing under this name.
DESCRIPTION = "unipose"
DTYPES = ("BOOL", "I64", "F16", "BF16", "F32", "F64")  # of tensors, as safetensors calls them


def read_header(path):
    """The header of a safetensors file -> (metadata, {name: shape}). Raises UserError.

    Reads no tensor. safetensors itself checks that the shapes fit the size of the file.
    """
    from safetensors import safe_open

    require_file(path)
    shapes = {}
    with as_user_error(f"{path} is not a complete safetensors file (", "); copy or train it again"):
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():
                part = file.get_slice(name)
                shapes[name] = torch.Size(part.get_shape())
                if part.get_dtype() not in DTYPES:
                    raise UserError(f"{path} holds {shorten(name)} of type {part.get_dtype()}, "
                                    f"expected one of {', '.join(DTYPES)}")
    return metadata, shapes


def read_checkpoint(folder):
    """What a checkpoint says of itself -> (config, text tokenizer, {name: shape}), none checked.

    Both are dicts, the text tokenizer one of the package `tokenizers`. Raises UserError.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        out = shlex.quote(str(folder))
        raise UserError(f"there is no weights folder at {folder}; give another one, or train it: "
                        f"python train.py --stage all --size tiny --out {out}")
    path = folder / "model.safetensors"
    if not path.exists():
        raise UserError(f"the weights folder {folder} has no model.safetensors; "
                        "it is not a finished checkpoint of train.py")

    metadata, shapes = read_header(path)
    if DESCRIPTION not in metadata:
        return read_json(folder / "config.json"), read_json(folder / "tokenizer.json"), shapes
    with as_user_error(f"{path} does not describe a UniPose model (", "); copy or train it again"):
        description = json.loads(metadata[DESCRIPTION])
        return dict(description["config"]), dict(description["tokenizer"]), shapes


def shorten(value):
    """A value from a file as one short line for a message."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_entries(entries, allowed, where):
    """Checks the types and ranges of a JSON object before it is used. Raises UserError.

    allowed: {key: what the value may be}, see `is_allowed`. Every key of `entries` must be in it.
    """
    for key, value in entries.items():
        name = f"{where} {shorten(key)}"
        if key not in allowed:
            raise UserError(f"{name} is not known")
        if isinstance(allowed[key], dict) and type(value) is dict:
            check_entries(value, allowed[key], name)
        elif not is_allowed(value, allowed[key]):
            raise UserError(f"{name} is {shorten(value)}, not {describe_allowed(allowed[key])}")


MAX_NUMBER = 1e12  # well within what float32 can hold


def is_allowed(value, allowed):
    """Whether a JSON value is in a range of whole numbers, one of a tuple, or of a type.

    float stands for any positive number; a list of one such thing for a list of any length.
    """
    if isinstance(allowed, range):
        return type(value) is int and value in allowed
    if isinstance(allowed, tuple):
        return type(value) in (str, type(None)) and value in allowed
    if isinstance(allowed, list):
        return type(value) is list and all(is_allowed(item, allowed[0]) for item in value)
    if allowed is float:
        return type(value) in (int, float) and value > 0 and value < MAX_NUMBER
    return type(value) is allowed


def describe_allowed(allowed):
    """What `is_allowed` accepts, in words."""
    if isinstance(allowed, range):
        return f"a whole number from {allowed.start} to {allowed.stop - 1}"
    if isinstance(allowed, tuple):
        return " or ".join(map(str, allowed))
    if isinstance(allowed, list):
        return f"a list of which each is {describe_allowed(allowed[0])}"
    if isinstance(allowed, dict) or allowed is dict:
        return "a JSON object"
    return {float: "a positive number", bool: "true or false", str: "a text"}[allowed]


# ---- 7. Run me -----------------------------------------------------------------------------------
# A person of the training split who points to the side: the axis-angles, in whole degrees, of the
# joints that differ from the T-pose.
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
    """The pose of EXAMPLE -> rotmat (22,3,3). `python captions.py` describes the same one."""
    degrees = torch.zeros(len(JOINTS), 3)
    for joint, angles in EXAMPLE.items():
        degrees[JOINTS.index(joint)] = torch.tensor(angles)
    return aa_to_matrix(torch.deg2rad(degrees))


def load_pose_tokenizer(folder):
    """The pose tokenizer of a weights folder, without the rest of the model. Raises UserError."""
    from safetensors import safe_open

    config, _, shapes = read_checkpoint(folder)
    where = f"the config of {folder}:"
    if config.get("pose_head", "codes") != "codes":
        raise UserError(f"{folder} holds a model without codes, so it has no pose tokenizer; name "
                        "one of --pose_head codes")
    sizes = config.get("tokenizer")
    check_entries({"tokenizer": sizes}, {"tokenizer": TOKENIZER_ENTRIES}, where)
    with as_user_error(f"{folder} holds no complete pose tokenizer (", "); copy or train it again"):
        # on the meta device sizes that do not fit the file cost no memory
        with torch.device("meta"):
            tokenizer = PoseTokenizer(TokenizerConfig(**sizes))

        prefix = "pose_tokenizer."
        state = {}
        with safe_open(str(pathlib.Path(folder, "model.safetensors")), "pt") as file:
            for name in shapes:
                if name.startswith(prefix):
                    state[name.removeprefix(prefix)] = file.get_tensor(name).float()
        tokenizer.load_state_dict(state, assign=True)
    return tokenizer.eval()


@dataclasses.dataclass
class Config:
    """Encode one pose with a trained tokenizer, print its code words, and decode them again."""
    weights: str = TINY  # a trained folder


def main():
    """Prints the code words of the example pose, and how far its decoded joints are off."""
    config = cli(Config)
    tokenizer = load_pose_tokenizer(config.weights)
    body = load_body()
    rotmat = example_pose()

    ids = tokenizer.encode(rotmat[None])                                      # (1,N)
    recon = tokenizer.decode(ids)[0]                                          # (22,3,3)
    distance = body.joints(recon) - body.joints(rotmat)                       # (22,3)
    error = 1000 * distance.norm(dim=-1)                                      # (22,)

    print(f"pose          22 rotations, {matrix_to_sixd(rotmat).numel()} numbers in 6D")
    print(f"code words    {' '.join(map(str, ids[0].tolist()))}")
    print(f"              {tokenizer.n_tokens} words out of {tokenizer.config.codes}")
    print(f"decoded       {error.mean():.1f} mm off, mean of 22 joints")
    for joint in ("left_knee", "left_elbow", "left_wrist", "right_wrist", "head"):
        print(f"    {joint:<12}{error[JOINTS.index(joint)]:>6.1f} mm")


if __name__ == "__main__":
    run_main(main)
