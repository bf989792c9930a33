"""What the model is taught: seven tasks over people, words and pictures that can be made without end.

A pose is measured, the measurements fall into named categories (posecodes), and a caption says some of the categories:

    person (split, i) --activities.json--> pose --measure--> posecodes --choose--> codes --say--> "Both knees bend."
            |                               ^                                        |              |
            +-- edit of it (split, i+1) ----+                                        +- statements -+
            +-- photograph at some heading, in some clothes and light         reads them back, so answers can be marked

A task is a template with slots; a template filled with an example is a list of *segments* (kind, value, is_target) with
kind "text" | "pose" | "image", and that is all the model ever sees of this file. Nothing here has a state: person i (of
tokenizer.py, who also draws them) is a function of (split, i), example k of a mixture one of (seed, k).

Letters: M poses, S columns of posecodes, P super-posecodes, J=22 joints, V vertices.

    python data.py                       # one example of each task, and out/world.png: 32 photographs
    python data.py --speed 10000         # how fast the full captions are, and in how much memory
    python data.py --check amass:/data/AMASS/CMU               # real data: counts, ranges, a picture
    python data.py --build imagescript --poses world:train:2000 --quota world=500 --quota world=50:test
"""
import functools
import io
import itertools
import json
import math
import pathlib
import re
import sys
import tarfile
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

from captions import (
    VIEWS, add_view, caption, caption_words, choose_codes, difference, eligible_codes, full_caption,
    full_captions, paircodes, pose_table, posecodes, rest_joints, to_text,
)
from tokenizer import (
    JOINTS, Z_UP_TO_Y_UP, SafeUnpickler, UserError, aa_to_matrix, as_user_error, atomic_write, cli,
    face_front, first_line, forward_kinematics, list_files, load_asset, load_body, load_json,
    matrix_to_aa, mirror, read_arrays, run_main, skip_bad_entry, turn_root,
)


# ---- 1. Seven tasks and their templates ----------------------------------------------------------
class Task(NamedTuple):
    """One row is all that training, sampling, the tour and evaluation know of a task."""

    inputs: tuple           # "pose" | "image" | "text", in the order of the slots in its templates
    target: str             # "pose" | "text"
    text: str = "caption"   # the method of `World` that words its text
    typed: str = ""         # the method that words it in training prompts, where that is another
    frame: str = "body"     # its poses face +z ("body"), or stand as the camera sees them ("camera")
    pair: bool = False      # it is about A and B, an edit of A; the target is about B


# UniPose table 1: comprehension, generation, editing
TASKS = {
    "pose2text": Task(("pose",), "text"),
    "posediff": Task(("pose", "pose"), "text", text="difference", pair=True),
    "image2text": Task(("image",), "text", text="image_caption"),
    "imagediff": Task(("image", "image"), "text", text="difference", pair=True),
    "text2pose": Task(("text",), "pose", typed="user_prompt"),
    "image2pose": Task(("image",), "pose", frame="camera"),
    "edit": Task(("pose", "text"), "pose", text="difference", pair=True),
}
SLOT = re.compile(r"(<\w+>)")
N_TEMPLATES = 200                                            # a task


def slots(task):
    """The slots of a task's templates, in order: ["<poseA>", "<poseB>"] for posediff."""
    inputs = TASKS[task].inputs
    if len(inputs) == 2 and inputs[0] == inputs[1]:
        return [f"<{inputs[0]}A>", f"<{inputs[0]}B>"]
    return [{"text": "<caption>"}.get(kind, f"<{kind}>") for kind in inputs]


@functools.cache
def templates(task):
    """-> tuple of 200 distinct instructions of a task; number 0 is the plain one.

    assets/instructions.json is a grammar: a pattern's {word} stands for any entry of the list `word`. All sentences of
    a pattern are written out and shuffled, then the patterns take turns: the first few already differ in form.
    """
    grammar = load_asset("instructions")

    def expand(text):
        word = re.search(r"\{(\w+)\}", text)
        if not word:
            text = re.sub(r" ([.,?])", r"\1", " ".join(text.split()))
            return [re.sub(r"(^|[.?] |<caption> )([a-z])", lambda start: start[1] + start[2].upper(), text)]
        return [line for entry in grammar["lists"][word[1]] for line in expand(text.replace(word[0], entry, 1))]

    plain, patterns = grammar["tasks"][task]["plain"], [expand(text) for text in grammar["tasks"][task]["patterns"]]
    turns = itertools.zip_longest(*(np.random.default_rng(0).permutation(lines).tolist() for lines in patterns))
    return tuple(dict.fromkeys([plain, *filter(None, itertools.chain(*turns))]))[:N_TEMPLATES]


def task_values(task, value_of):
    """The inputs of a task in order, then its target.

    value_of(kind, which) gives one value: `which` is 0 for A or for the only person, 1 for B.
    """
    row = TASKS[task]
    values = []
    for position, kind in enumerate(row.inputs):
        which = row.inputs[:position].count(kind)           # the second pose, or image, is B's
        values.append(value_of(kind, which))
    values.append(value_of(row.target, int(row.pair)))
    return values


def render_template(task, values, template):
    """A template filled with an example -> segments [(kind, value, is_target)], the answer last.

    values: the task's inputs in order, then its target. The template is cut at its slots before anything is put in, so
    a caption that itself says "<pose>" stays text.
    """
    row = TASKS[task]
    filled = dict(zip(slots(task), zip(row.inputs, values)))
    pieces = [filled.get(piece, ("text", piece)) for piece in SLOT.split(template) if piece]
    return [(kind, value, False) for kind, value in pieces] + [(row.target, values[-1], True)]


# ---- 2. Synthetic people: poses without end. M of them, each of C angles -------------------------
LEGS_ARMS = ["left_leg", "right_leg", "left_arm", "right_arm"]
BODY_PARTS = ["root", "trunk", "head", *LEGS_ARMS]
EDIT_WEIGHTS = np.array([0, 2, 0, 2, 0, 1, 1])                   # tickets in a lottery; the right leg carries and stays
N_EDITS_CDF = [0.10, 0.40]                                       # share of edits of one part; of one or two (the rest: three)
LOW_MOTION_JOINTS = [JOINTS.index(f"{side}_{part}") for side in ("left", "right") for part in ("collar", "foot", "wrist")]


def hash_uniform(rows, n):
    """Row numbers (M,) -> (M,n) numbers in [0,1): a pure function of (row, column), by splitmix64.

    A hash of the counter, not a stream: a row stays what it is whatever else is drawn, and all rows are done at once.
    """
    z = np.asarray(rows, np.uint64)[:, None] * np.uint64(1 << 16) + np.arange(1, n + 1, dtype=np.uint64)
    z = z * np.uint64(0x9E3779B97F4A7C15)                  # arrays of unsigned numbers wrap around, as they should
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / float(1 << 53)


class ActivityTable:
    """assets/activities.json as arrays. A person is C angles in degrees, named and limited as the table says.

    An activity holds ranges of root, trunk and head, and for every limb a list of gestures to choose from; a gesture
    is a range for each angle of one limb. fresh, edited: what a person, or an edit of one, draws from.
    """

    def __init__(self):
        table = load_asset("activities")
        self.gestures, self.sets = {"leg": table["legs"], "arm": table["arms"]}, table["sets"]
        limits = {part: table["limits"][part.split("_")[-1]] for part in BODY_PARTS}
        self.angles = [(part, angle) for part in BODY_PARTS for angle in limits[part]]
        self.limits = np.array([limits[part][angle] for part, angle in self.angles], np.float64)     # (C,2)
        self.owner = np.array([BODY_PARTS.index(part) for part, _ in self.angles])                             # (C,)
        self.turns = self.read_turns(table["axes"])
        rows = {name: {**table["usual"], **row} for name, row in table["activities"].items()}
        self.activities = list(rows)
        often = np.cumsum([row.get("often", 1.0) for row in rows.values()])
        self.shares = often / often[-1]                                                      # (A,) cumulated
        self.fresh = self.options(rows.values(), ["trunk", *LEGS_ARMS])
        self.edited = self.options(rows.values(), ["edit_trunk", "edit_legs", "edit_legs", "edit_arms", "edit_arms"])

    def at(self, angle, parts=BODY_PARTS):
        """The columns of an angle: at("flex") -> those of both legs."""
        return [c for c, (part, name) in enumerate(self.angles) if name == angle and part in parts]

    def read_turns(self, axes):
        """-> (3,C,22,3): angles times this are the axis-angles of three turns of every joint, the last done first."""
        out = np.zeros((3, len(self.angles), len(JOINTS), 3))
        for joint, turns in axes.items():
            for slot, (part, angle, axis, share) in enumerate(turns):
                turn = math.radians(share) * np.eye(3)["xyz".index(axis[1])] * (1 if axis[0] == "+" else -1)
                out[slot, self.at(angle, [part]), JOINTS.index(joint)] = turn
                if part in LEGS_ARMS:                      # the right limb mirrors the left: y and z turn backwards
                    right = self.at(angle, [part.replace("left", "right")])
                    out[slot, right, JOINTS.index(joint.replace("left", "right"))] = turn * [1, -1, -1]
        return out

    def span(self, part, ranges):
        """{angle: [lo, hi]} of one part -> (2,C), 0 elsewhere. A foot left out is NaN: see `settle`."""
        out = np.zeros((2, len(self.angles)))
        for c in np.flatnonzero(self.owner == BODY_PARTS.index(part)):
            out[:, c] = ranges.get(self.angles[c][1], np.nan if self.angles[c][1] == "point" else 0)
        return out

    def options(self, rows, keys):
        """-> ranges of root, trunk and head (A,2,C), of the limbs' gestures (A,4,O,2,C), how many of these (A,4)."""
        body, limbs = [], []
        for row in rows:
            ranges = row.get("root", {}), row[keys[0]], row["head"]
            body.append(sum(self.span(*pair) for pair in zip(BODY_PARTS, ranges)))
            limbs.append([[self.span(limb, self.gestures[limb.split("_")[1]][name])
                           for entry in row[key] for name in self.sets.get(entry, [entry])]
                          for limb, key in zip(LEGS_ARMS, keys[1:])])
        counts = np.array([[len(gestures) for gestures in row] for row in limbs])
        padded = [[(gestures * counts.max())[:counts.max()] for gestures in row] for row in limbs]
        return np.array(body), np.array(padded), counts

    def draw(self, table, activity, u):
        """Activities (M,), random numbers (M,4+C) -> angles (M,C), each within its range."""
        body, limbs, counts = table
        choice = (u[:, :4] * counts[activity]).astype(int)                                   # (M,4)
        spans = body[activity] + limbs[activity[:, None], np.arange(4), choice].sum(1)       # (M,2,C)
        return spans[:, 0] + u[:, 4:] * (spans[:, 1] - spans[:, 0])

    def edit(self, angles, activity, u):
        """Changes one to three parts of each person, the head sometimes too. angles (M,C), u (M,9+2(4+C)) -> (M,C)."""
        near, far = (self.draw(self.edited, activity, v) for v in np.split(u[:, 9:], 2, axis=1))
        own = np.eye(len(BODY_PARTS))[self.owner]                                                      # (C,7)
        # of two drafts of every part the one that moves more: an edit should be seen
        pick = [np.nan_to_num(np.abs(draft - angles)) @ own for draft in (near, far)]        # (M,7)
        target = np.where((pick[1] > pick[0])[:, self.owner], far, near)
        tickets = u[:, :7] ** (1 / np.maximum(EDIT_WEIGHTS, 1e-3))                                 # a lottery with weights
        changed = tickets.argsort(1).argsort(1) >= 6 - (u[:, 7:8] > N_EDITS_CDF).sum(1, keepdims=True)
        changed[:, BODY_PARTS.index("head")] = u[:, 8] < 0.4
        return np.where(changed[:, self.owner], target, angles)

    def apply_joint_limits(self, angles):
        """Angles as drawn (M,C) -> as the joints have them: soles level, bowed at the hips, all within limits."""
        angles, hinge, legs, feet = angles.copy(), self.at("hinge"), self.at("flex"), self.at("point")
        level = angles[:, legs] - angles[:, self.at("knee")]
        angles[:, feet] = np.where(np.isnan(angles[:, feet]), level, angles[:, feet])
        # who already sits cannot bow far: the hips have only so much room
        angles[:, hinge] = np.minimum(angles[:, hinge], self.limits[legs[0], 1] - angles[:, legs].max(1, keepdims=True))
        angles[:, legs] += angles[:, hinge]
        return angles.clip(*self.limits.T)

    def rotations(self, angles, still):
        """Settled angles (M,C), small turns of collars, feet and wrists (M,18) degrees -> rotmat (M,22,3,3) float32."""
        angles = angles.copy()
        angles[:, self.at("raise")] -= 90                  # the rest pose is a T
        angles[:, self.at("pitch")] += angles[:, self.at("hinge")]
        first, second, third = torch.tensor(np.einsum("mc,scjk->smjk", angles, self.turns, optimize=True)).float()
        third[:, LOW_MOTION_JOINTS] = torch.tensor(np.radians(still)).float().unflatten(1, (6, 3))
        return aa_to_matrix(first) @ aa_to_matrix(second) @ aa_to_matrix(third)              # (M,22,3,3)


activity_table = functools.cache(ActivityTable)                           # the tables are read once
SPLITS = {"train": 0, "val": 1 << 20, "test": 2 << 20}     # where a split starts among all people: they never meet
N_UNIFORMS = 96                                              # random numbers a row may use
VIEW_CDF = (0.7, 0.8, 0.9)                                     # their shares, cumulated; the last takes what is left


def sample_people(split, n):
    """The first n people of a split (n even) -> activity indices (n,), rotmat (n,22,3,3), headings (n,) radians.

    Rows 2i and 2i+1 are a pair: the second is an edit of the first. Half of the pairs are mirrored. Raises UserError.
    """
    if split not in SPLITS or not 2 <= n <= 1 << 20 or n % 2:
        raise UserError(f"no {n} people in split {split!r}: the splits are {', '.join(SPLITS)}, and people come in pairs")
    crowd, u = activity_table(), hash_uniform(SPLITS[split] + np.arange(n), N_UNIFORMS)
    wide, one, two = 4 + len(crowd.angles), u[0::2, 4:], u[1::2, 4:]
    activity = np.searchsorted(crowd.shares, u[0::2, 0], side="right")
    drawn = crowd.draw(crowd.fresh, activity, one[:, :wide]) + 4 * one[:, wide:2 * wide - 4] - 2    # noise: 2 degrees
    angles = np.stack([drawn, crowd.edit(drawn, activity, two[:, :9 + 2 * wide])], 1).reshape(n, -1)
    rotmat = crowd.rotations(crowd.apply_joint_limits(angles), (6 * one[:, -18:] - 3).repeat(2, 0))
    flipped = torch.tensor(u[0::2, 1] < 0.5).repeat_interleave(2)
    rotmat[flipped] = mirror(rotmat[flipped])
    view = np.searchsorted(VIEW_CDF, u[:, 2], side="right")    # most face the camera
    headings = view * math.pi / 2 + (2 * u[:, 3] - 1) * math.radians(35)
    return activity.repeat(2), rotmat, (headings + math.pi) % (2 * math.pi) - math.pi


# ---- 3. The renderer, and photographs ------------------------------------------------------------
LIGHT = np.array([-0.41, 0.68, 0.60])                      # length 1: from above, the picture's left, the front
DISTANCE, PITCH = 5.0, 0.16                                # camera: metres from the person, radians looking down
CLOTHES = {"skin": (0.87, 0.68, 0.57), "hair": (0.20, 0.14, 0.11), "shirt": (0.93, 0.91, 0.86),
           "trousers": (0.47, 0.50, 0.56), "shoes": (0.26, 0.26, 0.29)}
SIDES = {"left": (0.93, 0.47, 0.24), "right": (0.20, 0.52, 0.82)}                # the person's left warm, right cool


def body_colors(body, sides=0.75, **clothes):
    """One colour for each vertex -> (V,3) in 0..1: dressed, dark hair, so that front, back, left and right tell apart.

    clothes: any entry of CLOTHES, as rgb. sides: how strongly the limbs take the tint of their side (0: not at all).
    """
    clothes = {**CLOTHES, **clothes}
    # what each joint wears; those not named here wear the shirt
    wear = dict.fromkeys(("pelvis", "hip", "knee"), "trousers") | dict.fromkeys(("ankle", "foot"), "shoes")
    wear |= dict.fromkeys(("neck", "head", "wrist", "hand"), "skin")
    palette = []
    for name in JOINTS + ["left_hand", "right_hand"]:
        side, _, part = name.rpartition("_")
        color = np.array(clothes[wear.get(part, "shirt")])
        limb = side in SIDES and part in ("hip", "knee", "shoulder", "elbow")  # hands and feet stay natural
        palette.append(color + sides * limb * (SIDES.get(side, color) - color))
    share = body.weights.cpu().numpy() ** 3                # cubed: hems half as wide as the skin's own blending
    colors = share @ np.array(palette) / share.sum(1, keepdims=True)
    # the skull: hair behind the ears and above the forehead, skin in front
    head, place = body.weights[:, 15].cpu().numpy() > 0.5, (body.template - body.rest[15]).cpu().numpy()
    tall = place[head, 1].max()                            # from the head joint to the crown, metres
    hair = head & (place[:, 1] > 0.15 * tall) & (place[:, 2] < 0.05 - 0.9 * (0.85 * tall - place[:, 1]).clip(0))
    colors[hair | (head & (place[:, 1] > 0.82 * tall))] = clothes["hair"]
    return colors


def rotation_y(angle):
    """Rotation by `angle` radians about the vertical: a person who faced +z then faces +x for angle = pi/2."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def camera(points, frame, size, zoom, shift):
    """Points (n,3) seen by the camera -> pixels (n,2), depth (n,), larger is nearer; `frame` (m,3) is what must fit.

    The frame fills three quarters of the picture's width, or 0.92 of its height, whichever comes first.
    """
    c, s = math.cos(PITCH), math.sin(PITCH)
    down = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    middle = (frame.min(0) + frame.max(0)) / 2             # the camera looks at it from DISTANCE

    def project(at):
        x, y, z = ((at - middle) @ down.T).T
        return np.stack([x, -y], 1) * (DISTANCE / (DISTANCE - z))[:, None], z  # mild perspective: near limbs are larger

    flat, _ = project(frame)                               # metres in the picture's plane
    low, high = flat.min(0), flat.max(0)
    scale = zoom * size * min(0.75 / (high[0] - low[0]), 0.92 / (high[1] - low[1]))
    flat, depth = project(points)
    return (flat - (low + high) / 2) * scale + (np.array(shift) + 0.5) * size, depth


def shadow(canvas, pixels):
    """Darkens the floor under the person: the vertices dropped onto it, counted on a coarse grid, blurred."""
    size, grid = canvas.width, 64
    cells = np.clip(pixels * grid / size, 0, grid - 1).astype(int)
    counts = np.bincount(cells[:, 1] * grid + cells[:, 0], minlength=grid * grid).reshape(grid, grid)
    # saturating: a leg seen from above holds few vertices, but its shadow is as dark as the torso's
    soft = 100 * (1 - np.exp(-counts * 700 / len(pixels)))
    mask = Image.fromarray(soft.astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.3)).resize((size, size), 2)
    canvas.paste((40, 40, 50), mask=mask)


def render(vertices, faces, colors, size=256, heading=0.0, background=(236, 236, 240), zoom=1.0, shift=(0.0, 0.0),
           floor=True, light=LIGHT):
    """Draws a mesh: vertices (V,3) y up, faces (F,3), colors (V,3) in 0..1 -> picture (size,size,3) uint8.

    heading: radians that the person is turned about the vertical (0: faces the camera; pi/2: faces the right edge).
    background: an rgb colour (0..255) or a picture (size,size,3). zoom, shift: framing noise (factor, share of size).
    light: unit vector to the lamp.
    Painter's algorithm: triangles facing us, far ones first, drawn twice as large and averaged down.
    """
    vertices, faces = np.asarray(vertices, np.float64) @ rotation_y(heading).T, np.asarray(faces)
    corners = vertices[faces]                                                     # (F,3,3)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # longer where larger
    # a vertex's normal: the sum over its triangles, so that large ones count more
    smooth = np.stack([np.bincount(faces.ravel(), np.repeat(normals[:, k], 3), len(vertices)) for k in range(3)], 1)
    smooth /= np.linalg.norm(smooth, axis=1, keepdims=True) + 1e-12
    lit = 0.5 + 0.5 * smooth @ light                       # half Lambert: no side is black
    shaded = np.asarray(colors) * (0.30 + 0.80 * lit ** 1.5)[:, None]
    pixels, depth = camera(vertices, vertices, 2 * size, zoom, shift)
    seen = pixels[faces]                                                          # (F,3,2)
    one, two = seen[:, 1] - seen[:, 0], seen[:, 2] - seen[:, 0]
    front = np.flatnonzero(one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0] < 0)     # counter-clockwise, y now down
    front = front[np.argsort(depth[faces[front]].sum(1))]  # farthest first
    inks = (255 * shaded[faces[front]].mean(1).clip(0, 1)).astype(int) @ [1, 256, 65536]  # Pillow's packed rgb
    canvas = Image.new("RGB", (2 * size, 2 * size), tuple(background) if np.ndim(background) == 1 else None)
    if np.ndim(background) > 1:
        canvas.paste(Image.fromarray(np.asarray(background, np.uint8)).resize(canvas.size))
    if floor:
        dropped = vertices * [1, 0, 1] + [0, vertices[:, 1].min(), 0]  # lowest point = floor
        shadow(canvas, camera(dropped, vertices, 2 * size, zoom, shift)[0])
    draw = ImageDraw.Draw(canvas)
    for points, ink in zip(seen[front].reshape(-1, 6).tolist(), inks.tolist()):
        draw.polygon(points, fill=ink)
    return np.asarray(canvas.reduce(2))                    # averaging smooths the edges


default_body = functools.cache(load_body)                        # who stands before the camera


def random_color(rng, low, high):
    """A random colour (3,) in 0..1: a grey between low and high, and some tint."""
    return (rng.uniform(low, high) + rng.uniform(-0.16, 0.16, 3)).clip(0, 1)


def random_outfit(rng):
    """Random clothes for `body_colors`. Hair stays dark and skin lighter, so that front and back can be told apart."""
    return {"skin": np.array([0.93, 0.76, 0.64]) * rng.uniform(0.65, 1.05), "hair": rng.uniform(0.02, 0.14, 3),
            "shirt": random_color(rng, 0.15, 0.9), "trousers": random_color(rng, 0.1, 0.75), "shoes": random_color(rng, 0.05, 0.35)}


def random_background(rng, size):
    """A random background (size,size,3) uint8: plain, a gradient, soft noise, or a wall that meets the floor."""
    across, down = np.meshgrid(*2 * [np.linspace(0, 1, size)])
    way, cloud = rng.uniform(-1, 1, 2), Image.fromarray(rng.integers(0, 256, (7, 7), dtype=np.uint8))
    weight = [lambda: 0 * down,
              lambda: (0.5 + (across - 0.5) * way[0] + (down - 0.5) * way[1]).clip(0, 1),
              lambda: np.asarray(cloud.resize((size, size), Image.BICUBIC)) / 255,
              lambda: down > 0.68 + 0.15 * way[0]][rng.integers(4)]()
    one, two = random_color(rng, 0.35, 0.95), random_color(rng, 0.35, 0.95)
    return (255 * (one + weight[..., None] * (two - one))).astype(np.uint8)


def render_photo(rotmat, size, look, rng):
    """One person as the camera sees it: rotmat (22,3,3) -> picture (size,size,3) uint8, where its joints are (22,2) in
    pixels. look: generator of clothes, rng: of the rest: lamp, exposure, what stands behind, how large and where."""
    body, zoom, lamp = default_body(), rng.uniform(0.75, 1.0), rng.normal(size=3) * [1, 0.7, 0.5] + [0, 0.6, 0.8]
    joints, vertices = (points[0].numpy() for points in body(rotmat[None]))
    colors = body_colors(body, 0, **random_outfit(look)) * rng.uniform(0.75, 1.15)
    shift = rng.uniform(-0.5, 0.5, 2) * (1.0 - 0.92 * zoom)  # what is not filled is room to stand elsewhere
    picture = render(vertices, body.faces, colors.clip(0, 1), size, background=random_background(rng, size), zoom=zoom,
                     shift=shift, floor=rng.random() < 0.7, light=lamp / np.linalg.norm(lamp))
    return picture, camera(joints, vertices, size, zoom, shift)[0]


CELL = 256                                                 # pixels of a cell


def text_cell(text):
    """A text as a picture (CELL,CELL), cut where it is too long."""
    cell = Image.new("RGB", (CELL, CELL), "white")
    lines = textwrap.wrap(text or "(no text)", 34)
    if len(lines) > 15:
        lines = [*lines[:14], "…"]
    font = ImageFont.load_default(14)
    ImageDraw.Draw(cell).multiline_text((8, 8), "\n".join(lines), fill=(30, 30, 30), font=font, spacing=2)
    return cell


def contact_sheet(rows):
    """Rows of cells with their titles -> one PIL picture.

    rows: [(title, [(name, value), ...]), ...]. title: text on the left, "" in all rows for none; name: text above a
    cell; value: a picture (PIL, or (H,W,3) uint8), or a text.
    """
    margin = 170 if any(title for title, _ in rows) else 0
    header = 24 if any(name for _, cells in rows for name, _ in cells) else 0
    height = CELL + header
    width = max(len(cells) for _, cells in rows) * CELL + margin
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)

    for row, (title, cells) in enumerate(rows):
        top = row * height
        draw.multiline_text((10, top + 30), title, fill="black", font=font)
        for column, (name, value) in enumerate(cells):
            left = margin + column * CELL
            draw.text((left + 4, top + 4), name, fill=(90, 90, 90), font=font)
            if isinstance(value, str):
                value = text_cell(value)
            if isinstance(value, np.ndarray):
                value = Image.fromarray(value)
            sheet.paste(ImageOps.fit(value, (CELL, CELL)), (left, top + header))
    return sheet


def save_png(picture, path):
    """Writes a PIL picture as PNG, whole or not at all. Raises UserError."""
    with atomic_write(path) as new:
        picture.save(new, format="PNG")


# ---- 4. World and Mixture ------------------------------------------------------------------------
class World:
    """The embedded data set: n people of a split, in pairs, with everything that can be asked about them.

    poses (n,22,3,3) facing +z, seen (n,22,3,3) the same in the camera's frame, headings (n,) radians, activity: list of
    n names. Rows 2i and 2i+1 are a pair. Row i is a pure function of (split, i), whatever n is. Raises UserError.
    """

    def __init__(self, split="train", n=2000, size=128):
        self.split, self.size = split, size
        activity, self.poses, self.headings = sample_people(split, n)
        self.activity = [activity_table().activities[a] for a in activity]
        self.camera_poses = turn_root(self.poses, torch.tensor(np.stack([*map(rotation_y, self.headings)])))

    def photo(self, i):
        """The photograph of person i (size,size,3) uint8, and its joints (22,2) in it. Pairs wear the same clothes."""
        row = SPLITS[self.split] + int(i)
        return render_photo(self.camera_poses[i], self.size, *map(np.random.default_rng, [(row // 2, 1), (row, 2)]))

    def image(self, i):
        """The photograph alone."""
        return self.photo(i)[0]

    @functools.cached_property
    def codes(self):
        """Posecodes of everybody, made when the first caption is asked for."""
        return posecodes(self.poses)

    @functools.cached_property
    def pairs(self):
        """Paircodes of all pairs, from even to odd rows and back."""
        even, odd = self.poses[0::2], self.poses[1::2]
        return paircodes(even, odd), paircodes(odd, even)

    @functools.cached_property
    def views(self):
        """The side that each person turns to the camera, one of VIEWS; "" for who lies, bows or hangs."""
        up = F.normalize(forward_kinematics(self.poses, rest_joints())[:, JOINTS.index("neck")], dim=-1)[:, 1]
        sides = np.round(self.headings / (math.pi / 2)).astype(int) % 4
        return [VIEWS[side] if straight > 0.7 else "" for side, straight in zip(sides, up)]

    def coarse_caption(self, i):
        """The coarse caption of a photograph: "tree pose, seen from the left"."""
        return ", ".join(filter(None, [self.activity[i], add_view(self.views[i])])).lower().rstrip(".")

    def caption(self, i, rng):
        """What person i does, in words; rng chooses what is said and how."""
        return caption(self.codes, i, rng)

    def image_caption(self, i, rng):
        """The same of the photograph: from which side it shows the person, if that can be said, comes first."""
        return add_view(self.views[i], self.caption(i, rng))

    def user_prompt(self, i, rng):
        """The same as somebody would type it: whole, or the activity's name, a few of the statements, or both."""
        if rng.random() < 0.5:
            return self.caption(i, rng)
        share = rng.choice([0.0, 0.1, 0.3, 0.5])
        said = [code for code in choose_codes(eligible_codes(pose_table(), self.codes, i), rng) if rng.random() < share]
        named = self.activity[i] + "." if i % 2 == 0 and rng.random() < 0.7 else ""    # an edit may be something else
        return " ".join(filter(None, [named[:1].upper() + named[1:], said and to_text(said, rng)])) or self.caption(i, rng)

    def difference(self, i, rng):
        """How to get from person i to its partner, in words."""
        return difference(self.pairs[i % 2], i // 2, rng)

    def subjects(self, task, i):
        """The people that a task is about: (i,), or i and its partner."""
        return (i, i ^ 1) if TASKS[task].pair else (i,)

    def text(self, task, i, rng, training=False):
        """The text of a task about person i, or about the way from i to its partner; see `example`."""
        row = TASKS[task]
        if training and row.target == "text":
            rng = None                                      # which wording is meant cannot be learned: one wording
        method = row.typed if training and row.typed else row.text
        return getattr(self, method)(i, rng)

    def example(self, task, i, rng, training=False, cache=None):
        """The inputs of a task about person i in order, then its target.

        rng draws the wording of texts. training: prompts are worded as people type them, and targets in one fixed way.
        cache: what stands in for this world's `poses`, `camera_poses` and `image`, such as code words and features.
        """
        source = cache or self
        subjects = self.subjects(task, i)

        def value_of(kind, which):
            if kind == "text":
                return self.text(task, i, rng, training)
            person = subjects[which]
            if kind == "image":
                return source.image(person)
            return (source.camera_poses if TASKS[task].frame == "camera" else source.poses)[person]

        return task_values(task, value_of)


class Mixture:
    """Endless training examples of some tasks: [k] -> (task, segments), a pure function of (seed, k).

    cache: see `World.example`. templates: how many of the 200 instructions are used (1: the plain one).
    photos: image tasks ask about the first so many people only (0: all).
    """

    def __init__(self, tasks, seed, world, cache=None, templates=N_TEMPLATES, photos=0):
        self.tasks, self.seed, self.world, self.templates = list(tasks), seed, world, templates
        self.photos, self.cache = photos or len(world.poses), cache

    def __getitem__(self, k):
        rng = np.random.default_rng((self.seed, k))
        task = self.tasks[rng.integers(len(self.tasks))]
        people = self.photos if "image" in TASKS[task].inputs else len(self.world.poses)
        i, line = int(rng.integers(people)), templates(task)[rng.integers(self.templates)]
        values = self.world.example(task, i, rng, training=True, cache=self.cache)
        return task, render_template(task, values, line)


def vocabulary(texts=()):
    """Sorted list of every word and mark, in lower case, that templates, captions and the texts say."""
    said = " ".join([*(SLOT.sub(" ", line) for task in TASKS for line in templates(task)), *map(add_view, VIEWS),
                     *activity_table().activities, *texts])
    return sorted(set(re.findall(r"[^\s.,?]+|[.,?]", said.lower())) | set(caption_words()))


# ---- 5. Pose files and pictures ------------------------------------------------------------------
def as_rotations(array, where):
    """Numbers of one pose, (22,3,3), (66,), (22,3) or (72,) -> rotmat (22,3,3) float32, exactly orthonormal.

    Rotations stored in bfloat16 are off by up to 4e-3; up to 1e-2 is mended (nearest rotation), more is a UserError.
    """
    if array.dtype.kind not in "iuf":
        raise UserError(f"{where} holds {array.dtype}, not numbers: give rotation matrices or axis-angles")
    if array.shape not in {(22, 3, 3), (66,), (22, 3), (72,)}:
        raise UserError(f"{where} has the shape {array.shape}: one pose is (22,3,3), or axis-angle (66,), (22,3), (72,)")
    pose = torch.as_tensor(array.astype(np.float64))
    if not (pose.abs() < 1000).all():                      # false for NaN too; no angle in radians is that large
        raise UserError(f"{where} has NaN, infinite or huge numbers in it: a pose is 22 rotations, in radians")
    if pose.dim() < 3:
        return aa_to_matrix(pose.reshape(-1, 3)[:22]).float()  # 72: SMPL's two hand joints are dropped
    gap = (pose @ pose.mT - torch.eye(3)).abs().amax((1, 2))
    bad = torch.nonzero((gap > 1e-2) | (torch.linalg.det(pose) < 0)).flatten().tolist()
    if bad:
        raise UserError(f"{where} is not made of rotations: matrix {bad[0]} ({JOINTS[bad[0]]}) is not orthonormal "
                      "with determinant 1")
    left, _, right = torch.linalg.svd(pose)
    return (left @ right).float()                          # the nearest rotation, in the least-squares sense


MOTION_KEYS = ("poses", "root_orient", "pose_body", "mocap_framerate", "mocap_frame_rate")    # both spellings occur


def read_motion(arrays, where):
    """Arrays of an AMASS .npz, SMPL+H (`poses`) or SMPL-X (`root_orient`, `pose_body`) -> axis-angles (T,66), z up,
    and frames a second, 0 where the file does not say. Raises UserError."""
    if {"root_orient", "pose_body"} <= arrays.keys():
        root, limbs = arrays["root_orient"], arrays["pose_body"]
        if root.shape[1:] != (3,) or limbs.shape != (len(root), 63):
            raise UserError(f"{where}: root_orient must be (frames,3) and pose_body (frames,63), as in AMASS")
        poses = np.concatenate([root, limbs], 1)
    elif "poses" in arrays and arrays["poses"].ndim == 2 and arrays["poses"].shape[1] >= 66:
        poses = arrays["poses"][:, :66]
    else:
        raise UserError(f"{where} holds no motion: poses (frames, 66 or more) is needed, as in AMASS")
    rate = next((arrays[name] for name in MOTION_KEYS[3:] if name in arrays), np.zeros(1))
    return poses, float(rate.item()) if rate.size == 1 and rate.dtype.kind in "iuf" else 0.0


def pose_of_frame(poses, frame, where):
    """One frame of a motion (T,66), z up -> rotmat (22,3,3), y up. Raises UserError."""
    if not 0 <= frame < len(poses):
        raise UserError(f"{where} has no frame {frame}: it holds {len(poses)}, counted from 0")
    return turn_root(as_rotations(poses[frame], f"frame {frame} of {where}"), Z_UP_TO_Y_UP)


def pose_from_camera(array, where):
    """A pose as `as_rotations` takes it, its root as a camera sees it (z ahead, y down) -> rotmat (22,3,3) in our
    frame, where +z comes towards the camera. Raises UserError."""
    return turn_root(as_rotations(np.asarray(array), where), torch.tensor([1.0, -1.0, -1.0]).diag())  # about x


def read_pose(path):
    """Reads one pose -> rotmat (22,3,3). Raises UserError on a file that is missing, damaged, or not one pose.

    .npy: (22,3,3), or axis-angle (66,), (22,3), (72,), body frame (y up).
    .npz: AMASS keys (`poses`, or `root_orient` + `pose_body`), z up, turned to y up here. `walk.npz:120` is frame 120.
    """
    path, _, frame = str(path).rpartition(":") if re.search(r"\.npz:\d+$", str(path)) else (path, "", "")
    arrays = read_arrays(path, MOTION_KEYS)
    if "" in arrays:
        return as_rotations(arrays[""], path)
    poses, _ = read_motion(arrays, path)
    if not frame and len(poses) > 1:
        raise UserError(f"{path} holds {len(poses)} frames, and one pose is wanted: name the frame, as in {path}:0")
    return pose_of_frame(poses, int(frame or 0), path)


def write_pose(path, rotmat):
    """Writes rotmat (22,3,3) as a one-frame AMASS .npz (z up); `read_pose` gives the pose back. Raises UserError."""
    rotmat = turn_root(rotmat.detach().cpu().double(), Z_UP_TO_Y_UP.T)                     # AMASS stores doubles
    poses = np.zeros((1, 156))                             # SMPL-H: 52 joints, the fingers at rest
    poses[0, :66] = matrix_to_aa(rotmat).flatten()
    with atomic_write(path) as new, open(new, "wb") as file:
        np.savez(file, poses=poses, trans=np.zeros((1, 3)), betas=np.zeros(16), gender="neutral", mocap_framerate=30.0)


def open_image(where, near=None):
    """[file, first byte, bytes (-1: all)] -> PIL RGB picture. near: a JPEG may be decoded coarsely, to no less than
    this size. Raises UserError."""
    try:
        with open(where[0], "rb") as file:
            file.seek(where[1])
            picture = Image.open(io.BytesIO(file.read(where[2])))
        picture.draft("RGB", near)
        return picture.convert("RGB")
    except Exception as error:                             # a damaged file can fail anywhere inside a decoder
        raise UserError(f"{where[0]} holds an image that cannot be decoded ({type(error).__name__})") from None


# ---- 6. Readers ----------------------------------------------------------------------------------
# A reader is a generator over one release on disk and yields records, dicts with the same keys in all of them:
#
#   id, source    the entry and its data set; split: "train" | "val" | "test" where the release says so
#   pose, start   (22,3,3) float32, y up, of a picture as its camera sees it (+z towards the camera); start: pose A
#                 where `pose` is pose B of a pair; together: are both frames of one sequence?
#   texts         of the pose, or of the way from start to pose
#   image, box    [file, first byte, bytes (-1: all)], a square in it, [middle x, middle y, side]; start_image: of A
#
# A release that cannot be read is a UserError. An entry that cannot is left out, and `skipped` says which and why.
def read_amass(path, skipped):
    """AMASS, SMPL+H or SMPL-X, a file, a subset or everything: 12 poses a second (every 10th where the file does not
    say how many it has) of the middle 60 % of each motion, since many begin and end in a T (TokenHMR)."""
    names = load_asset("amass")               # its folders, then and now
    for file in list_files(path, ".npz"):
        if file.name == "shape.npz" or file.stem.endswith("stagei"):
            continue                                       # a subject's shape: every folder has one
        with skip_bad_entry(skipped, file):
            poses, rate = read_motion(read_arrays(file, MOTION_KEYS), file)
            subset, step = file.resolve().parts[-3], max(1, round(rate / 12)) if rate else 10    # subset/subject/file
            for row in range(len(poses) // 5, len(poses) - len(poses) // 5, step):
                with skip_bad_entry(skipped, file):
                    yield {"id": f"{file}:{row}", "source": f"amass-{names.get(subset, subset)}",
                           "pose": pose_of_frame(poses, row, file).numpy()}


def find_poses(folder, root, wanted):
    """PoseScript's numbers of poses -> {number: (pose, sequence), or [why not]}, from AMASS by old names or new."""
    index, found = load_json([*folder.glob("ids_2_dataset*index*.json"), folder / "ids_2_dataset_index.json"][0]), {}
    names = load_asset("amass")
    opened = functools.lru_cache(1)(lambda file: read_motion(read_arrays(file, MOTION_KEYS), file)[0])
    for key in tqdm(sorted(wanted, key=lambda key: str(index.get(key))), "AMASS", leave=False):      # a file at a time
        with skip_bad_entry(why := [], f"pose {key}"):
            _, name, frame = index[key]
            first, _, rest = name.partition("/")
            homes = [first, names.get(first, first), *(old for old, new in names.items() if new == first)]
            file = next((path for home in homes if (path := root / home / rest).is_file()), root / name)
            why = pose_of_frame(opened(file), frame, file).numpy(), name
        found[key] = why
    return found


def read_posescript(path, root, skipped, patterns):
    """PoseScript v1 or v2, or PoseFix, whose entries are two of its poses, and the AMASS SMPL+H that both point into.
    patterns: files with texts, which are automatic, or written by people."""
    folder, texts, pairs = pathlib.Path(path), {}, pathlib.Path(path) / "pair_id_2_pose_ids.json"
    for file in (file for name in patterns for file in sorted(folder.glob(f"{name}.json"))):
        for key, said in load_json(file).items():
            texts.setdefault(key, []).extend([said] if isinstance(said, str) else said)
    split = {str(k): split for split in SPLITS for file in folder.glob(f"{split}_*ids*.json") for k in load_json(file)}
    poses = {str(k): two for k, two in enumerate(load_json(pairs))} if pairs.exists() else {key: [key] for key in texts}
    found = find_poses(folder, pathlib.Path(root), {str(k) for key in texts for k in poses.get(key, [])})
    for key, said in texts.items():
        with skip_bad_entry(skipped, f"entry {key}"):
            both = [found[str(k)] for k in (2 * poses[key])[:2]]
            if min(map(len, both)) < 2:
                raise UserError(*min(both, key=len))
            (start, one), (pose, two) = both
            record = {"id": key, "source": "posescript", "split": split.get(key, ""), "pose": pose, "texts": said}
            yield record | ({"source": "posefix", "start": start, "together": one == two} if pairs.exists() else {})


def picture_record(image, middle=None, sides=None, pose=None):
    """What a picture gives to its record: image; the square that 4D-Humans cuts around a box (pixels; it grows the box
    to 3:4); the pose, which is given with its root in the camera's frame. Raises UserError."""
    record = {"image": [str(image[0]), *image[1:]]}
    open_image(image, (64, 64))                            # it decodes, or is no entry
    if sides is not None:
        x, y, wide, high = np.ravel([middle, sides]).astype(float).tolist()
        if not (1 <= max(wide, high) < 1e5 and max(abs(x), abs(y)) < 1e5):    # false for NaN too
            raise UserError(f"its box is {wide} x {high} pixels around ({x}, {y})")
        record["box"] = [x, y, max(high, wide * 4 / 3)]
    return record if pose is None else record | {"pose": pose_from_camera(pose, "its pose").numpy()}


def read_tars(path, skipped):
    """4D-Humans' training tars, one or a folder of them: for each picture NNN.jpg a list of people, NNN.data.pyd."""
    for file in list_files(path, ".tar"):
        with skip_bad_entry(skipped, file), tarfile.open(file, "r:") as tar:       # a torn one gives what came before
            for key, group in itertools.groupby(tar, lambda member: re.match(r"(.*/)?[^/.]*", member.name)[0]):
                with skip_bad_entry(skipped, f"{file}/{key}"):
                    group = {member.name[len(key):].lower(): member for member in group}
                    photo = group[next((kind for kind in (".jpeg", ".png") if kind in group), ".jpg")]
                    for person in SafeUnpickler(tar.extractfile(group[".data.pyd"]), encoding="latin1").load():
                        with skip_bad_entry(skipped, f"{file}/{key}"):
                            yield {"id": f"{file.name}/{key}", "source": file.resolve().parent.name,
                                   **person_record(person, [file, photo.offset_data, photo.size])}


def person_record(person, image):
    """A person of a tar, whose scale is the box / 200, by `from_picture`. Raises UserError where HMR2 drops it, too."""
    seen = (np.asarray(person["keypoints_2d"])[:, 2] > 0.3).sum()
    fit = np.asarray(person.get("extra_info", {}).get("fitting_loss", {})).item()
    if not np.all(person["has_body_pose"]) or seen <= 4 or np.max(fit.get("reprojection_loss", 0)) >= 31_000:
        raise UserError(f"somebody has no pose, a bad fit, or only {seen} joints that are seen")
    return picture_record(image, person["center"], 200 * np.asarray(person["scale"]), np.asarray(person["body_pose"]))


def read_evaluation(path, root, skipped):
    """4D-Humans' evaluation .npz (3DPW, Human3.6M) and the folder of its images; here scales are pixels, one or two."""
    a = read_arrays(path, ("imgname", "center", "scale", "body_pose", "has_body_pose"))
    scale = a["scale"].reshape(len(a["imgname"]), -1) * np.ones(2)                      # (N,2)
    scale *= 200 if np.median(scale) < 20 else 1           # nobody is 20 pixels large: the unit of the tars
    for k, name in enumerate(a["imgname"]):
        with skip_bad_entry(skipped, f"{path}, row {k}"):
            name = name.decode() if isinstance(name, bytes) else str(name)
            pose = a["body_pose"][k] if "body_pose" in a and a.get("has_body_pose", np.ones(k + 1))[k] else None
            yield {"id": f"{name}:{k}", "source": pathlib.Path(path).stem, "split": "test",
                   **picture_record([pathlib.Path(root) / name, 0, -1], a["center"][k], scale[k], pose)}


def read_images(path, skipped):
    """A folder of pictures; boxes.json in it may name people: {"a.jpg": [left, top, wide, high], or a list of such}."""
    folder = pathlib.Path(path)
    boxes = load_json(folder / "boxes.json") if (folder / "boxes.json").exists() else {}
    for file in list_files(path, ".jpg", ".jpeg", ".png", ".bmp"):
        name = file.relative_to(folder).as_posix()
        with skip_bad_entry(skipped, file):
            for box in np.reshape(boxes.get(name, 4 * [0.0]), (-1, 4)).astype(float):
                where = [box[:2] + box[2:] / 2, box[2:]] if name in boxes else []
                yield {"id": name, "source": folder.resolve().name, **picture_record([file, 0, -1], *where)}


def read_built(path, skipped, refined=False):
    """What `--build` wrote, or only its refined texts."""
    for file in list_files(path, ".jsonl"):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            with skip_bad_entry(skipped, f"{file}, line {number}"):
                row = json.loads(line)
                for of, pose in (("", "pose"), ("start_", "start")) if "start" in row else (("", "pose"),):
                    row[pose] = as_rotations(np.array(row[pose]), pose).numpy()
                    row[of + "image"] = picture_record([file.parent / row[of + "image"], 0, -1])["image"]
                if "refined" in row or not refined:
                    yield row | ({"texts": [row["refined"]]} if refined else {})


def read_embedded(path, skipped):
    """People of the embedded world, `train:2000`, as their camera sees them."""
    split, _, n = path.partition(":")
    for i, pose in enumerate(World(split, int(n)).camera_poses.numpy()):
        yield {"id": str(i), "source": f"world-{split}", "split": split, "pose": pose}


TEXT_FILES = {"a": ["posescript_auto_*", "automatic_*", "posefix_auto_*"],             # by whom: A automatic, H people
        "h": ["posescript_human_*", "human*", "posefix_human_*", "posefix_paraphrases_*"]}
READERS = {"amass:PATH": read_amass, "tars:PATH": read_tars, "evaluation:NPZ,IMAGES": read_evaluation, "images:FOLDER": read_images,
           **{f"{name}_{who}:RELEASE,AMASS": functools.partial(read_posescript, patterns=TEXT_FILES[who])
              for name in ("posescript", "posefix") for who in TEXT_FILES},
           "built:FOLDER": read_built, "refined:FOLDER": functools.partial(read_built, refined=True), "world:SPLIT:N": read_embedded}


def read_records(specs):
    """Data sets, ["KIND:PATH", ...] as in READERS -> all records; prints what was left out, and why. Raises UserError."""
    found = []
    for spec in specs:
        kind, _, path = spec.partition(":")
        usage = next((usage for usage in READERS if usage.startswith(kind + ":")), "")
        paths, skipped, before = path.rsplit(",", usage.count(",")), [], len(found)
        if not usage or len(paths) <= usage.count(","):
            raise UserError(f"{spec!r} is no data set: give {usage or ', '.join(READERS)}")
        try:
            found += tqdm(READERS[usage](*paths, skipped), spec, leave=False)
        except Exception as error:                         # whatever a release of another layout leads to
            raise UserError(f"{spec} cannot be read: {first_line(error)}") from error
        if skipped:
            print(f"{spec}: {len(skipped)} entries are left out, such as", *skipped[:3], sep="\n    ", file=sys.stderr)
        if len(found) == before:
            raise UserError(f"{spec} holds nothing that can be read: check the path")
    return found


def records_with_pose(specs):
    """Records of single poses, and these poses (M,22,3,3). Raises UserError."""
    records = [record for record in read_records(specs) if "pose" in record and "start" not in record]
    if not records:
        raise UserError("there are no poses: give --poses KIND:PATH")
    return records, torch.tensor(np.stack([record["pose"] for record in records]))


def crop_picture(record, size, of=""):
    """The picture of a record (of="start_": of its pose A), its square or else the middle one -> PIL (size,size)."""
    picture = open_image(record[of + "image"])
    x, y, side = not of and record.get("box") or (picture.width / 2, picture.height / 2, min(picture.size))
    return picture.crop([round(at + k * side / 2) for k in (-1, 1) for at in (x, y)]).resize((size, size))


def summarise(records, path, size=128):
    """Prints counts and ranges of records, and draws 16 of them: their pictures, then their poses."""
    for (source, split), n in Counter((r["source"], r.get("split", "")) for r in records).most_common(20):
        print(f"{source:<28}{split:<6}{n:>9} entries")
    poses = np.array([r[key] for r in records for key in ("start", "pose") if key in r])
    poses = torch.tensor(poses).view(-1, 22, 3, 3)
    for what, values in {
            "words in a text": [len(text.split()) for r in records for text in r.get("texts", ())],
            "pixels, side of a box": [r["box"][2] for r in records if "box" in r],
            "degrees, bend of a joint": matrix_to_aa(poses[:, 1:]).norm(dim=-1).rad2deg().flatten().tolist(),
            "degrees, pelvis off upright": poses[:, 0, 1, 1].clamp(-1, 1).arccos().rad2deg().tolist()}.items():
        if values:
            print(f"{what:<30}{len(values):>11}   {min(values):.0f} to {max(values):.0f}, mean {np.mean(values):.0f}")
    strips, body = [], default_body()
    for r in records[::-(-len(records) // 16)]:
        strips.append([crop_picture(r, size, of) for of in ("start_", "") if of + "image" in r] + [
            Image.fromarray(render(body(torch.tensor(r[key])[None])[1][0], body.faces, body_colors(body), size))
            for key in ("start", "pose") if key in r])
    wide = size * max(map(len, strips))
    sheet = Image.new("RGB", (4 * wide, -(-len(strips) // 4) * size), "white")
    for k, c, cell in ((k, c, cell) for k, strip in enumerate(strips) for c, cell in enumerate(strip)):
        sheet.paste(cell, (k % 4 * wide + c * size, k // 4 * size))
    with atomic_write(path) as new:
        sheet.save(new, format="PNG")


# ---- 7. ImageScript and ImageDiff ----------------------------------------------------------------
# UniPose appendix A: poses --farthest points--> poses B --one of the 100 nearest that differs--> poses A --> texts
PICTURE_SIZE = 336                                                 # pixels of a picture, as CLIP takes it
REFINE_PROMPT = ("Rewrite this description of a person's pose in natural, concise English without repetitions. Keep every body "
       "part that it names, and whether it is the left or the right one. Answer with the description alone. ")


def farthest_points(points, n, start=0):
    """Farthest-point sampling of bodies (M,22,3), n <= M: the next one has the largest mean joint error to all before.

    -> indices, a list. Exact: whoever lies `near` a choice, and that choice twice as far from a new one, stays with it
    (triangle inequality), so most of the n x M distances are never measured.
    """
    near, owner = np.full(len(points), np.inf, np.float32), np.zeros(len(points), np.int32)
    chosen, order = np.empty((n, *points.shape[1:]), np.float32), []

    def apart(some):
        gap = (some - chosen[k]) ** 2
        return np.sqrt(gap[..., 0] + gap[..., 1] + gap[..., 2]).mean(-1)     # .sum(-1) of three is slow

    for k in tqdm(range(n), "farthest points", leave=False):
        order.append(int(near.argmax()) if k else int(start))
        chosen[k] = points[order[k]]
        rows = np.flatnonzero(apart(chosen[:k + 1])[owner] < 2.001 * near)   # .001 is for rounding
        gap = apart(points[rows])
        closer = gap < near[rows]
        near[rows[closer]], owner[rows[closer]] = gap[closer], k
        near[order[k]] = -1                                # never again, though its double may come last
    return order


def n_different(one, others):
    """In how many codes others (n,S+P) differ from one (S+P,); the turn of the head is not counted, as in PoseFix."""
    counted = [not row["kind"].startswith("relativeRot") for row in pose_table().columns]
    return (others != one)[:, counted + [True] * (len(one) - len(counted))].sum(1)


def choose_partners(chosen, features, category, least, rng):
    """To poses B, indices, a pose A each: any of the 100 nearest by cosine of features (M,d) that differs in `least` or
    more codes (M,S+P), but no pair twice -> {b: a}; a B without one is left out."""
    features, pairs = F.normalize(torch.as_tensor(features).float()), {}
    for part in torch.as_tensor(chosen).split(128):
        nearest = (features[part] @ features.T).topk(min(101, len(features))).indices.numpy()       # B itself is there
        for b, near in zip(part.tolist(), nearest):
            near = rng.permutation(near[(n_different(category[b], category[near]) >= least) & (near != b)]).tolist()
            pairs |= {b: a for a in near if pairs.get(a) != b}
    return pairs


def body_parts_in(text):
    """The parts that a text names, with their sides: {("left", "knee"), ...}; "both knees" are two."""
    found = re.findall(r"\b(?:(left|right)\s+)?(?:upper\s+)?(hand|wrist|(?:fore)?arm|elbow|shoulder|foot|ankle|shin|"
                       r"knee|thigh|leg|hip|head|neck|torso|body)(s?)\b", text.lower().replace("feet", "foots"))
    return {(own, part) for side, part, many in found for own in (("left", "right") if many and not side else (side,))}


def load_refiner(path):
    """A local Hugging Face chat model -> refine(text), which says a text anew, None where a part or its side got lost.
    In the paper GPT-4 does it. Raises UserError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with as_user_error(f"--refine {path} is no folder of a chat model and its tokenizer: "):
        spell = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True).eval()
        spell.apply_chat_template([{"role": "user", "content": ""}])

    @torch.no_grad()
    def refine(text):
        ask = [{"role": "user", "content": REFINE_PROMPT + text}]
        given = spell.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**given.to(model.device), max_new_tokens=200, do_sample=False)[0]
        made = " ".join(spell.decode(made[given["input_ids"].size(1):], skip_special_tokens=True).split())
        return made if body_parts_in(text) <= body_parts_in(made) else None

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return refine


def choose_rows(config, records, front):
    """What the quotas ask for -> [(split, b, a), ...], indices of records; a is None in ImageScript. Raises UserError."""
    level = torch.cat([torch.eye(3).expand(len(front), 1, 3, 3), front[:, 1:]], 1)           # orientation zero
    joints = torch.cat([forward_kinematics(part, rest_joints()) for part in level.split(10_000)]).numpy()
    rng, rows, free = np.random.default_rng(config.seed), [], np.ones(len(records), bool)
    if config.build == "imagediff":
        features = read_arrays(config.features, ()).get("", np.empty(0))
        if features.ndim != 2 or len(features) != len(records):
            raise UserError(f"--features {config.features} must hold a row for each of the {len(records)} poses: make it "
                          "by eval.py --features with the same --poses")
        category = np.concatenate([posecodes(part).category for part in front.split(1000)])
    for quota in config.quota or [f"={len(records)}"]:
        source, n, split = (re.fullmatch(r"(.*)=(\d+):?(train|val|test|)", quota) or re.match("()()()", "")).groups()
        pool = np.flatnonzero(free & [record["source"].startswith(source) for record in records])
        if not 0 < int(n or 0) <= len(pool):
            raise UserError(f"--quota {quota} is not SOURCE=NUMBER[:SPLIT], or more than the {len(pool)} poses left")
        chosen = farthest_points(joints[pool], int(n), rng.integers(len(pool)))
        free[pool[chosen]] = False
        pairs = dict.fromkeys(chosen)
        if config.build == "imagediff":
            pairs = choose_partners(chosen, features[pool], category[pool], config.differ, rng)
        rows += [(split or "train", pool[b], None if a is None else pool[a]) for b, a in pairs.items()]
        print(f"{len(pairs)} rows out of {len(pool)} poses {quota}")
    return rows


def build(config):
    """ImageScript or ImageDiff out of any poses: rows in OUT/imagescript.jsonl, their pictures below OUT/images."""
    records, poses = records_with_pose(config.poses)
    front, refine, kept = face_front(poses), load_refiner(config.refine) if config.refine else None, 0
    rows = choose_rows(config, records, front)
    refined = np.random.default_rng(config.seed).permutation(len(rows))[:config.refined or len(rows)]

    def half(k, of=""):
        """One pose of a row, and its picture, written."""
        record, name = records[k], f"images/{k:06d}.jpg"
        picture = crop_picture(record, PICTURE_SIZE) if "image" in record else Image.fromarray(
            render_photo(poses[k], PICTURE_SIZE, *(np.random.default_rng((config.seed, k, i)) for i in range(2)))[0])
        with atomic_write(config.out / name) as new:
            picture.save(new, format="JPEG", quality=92)
        return {of + "id": record["id"], of + "image": name,
                "start" if of else "pose": matrix_to_aa(poses[k]).double().numpy().ravel().round(6).tolist()}

    with atomic_write(config.out / f"{config.build}.jsonl") as path, open(path, "w", encoding="utf-8") as file:
        for k, (split, b, a) in enumerate(tqdm(rows, config.build, leave=False)):
            row = half(b) | {"source": records[b]["source"], "split": split} | ({} if a is None else half(a, "start_"))
            rng, pose, start = np.random.default_rng((config.seed, k)), front[b][None], front[[b if a is None else a]]
            codes = posecodes(pose) if a is None else paircodes(start, pose)
            row["texts"] = [full_caption(codes, 0, rng) for _ in range(3)]
            if refine and k in refined:
                made = refine(row["texts"][0])
                row["refined"], kept = made or row["texts"][0], kept + (not made)
            file.write(json.dumps(row) + "\n")
    print(f"{len(rows)} rows in {config.out}" + f"; {len(refined)} refined, {kept} kept as they were" * bool(refine))


# ---- 8. Run it: one example of each task ---------------------------------------------------------
@dataclass
class Config:
    """Print one example of each task and draw 32 people; or look at real data; or build a data set."""
    split: str = "train"                                   # of the embedded world: train | val | test
    seed: int = 0                                          # which examples
    out: str = ""                                          # folder of what is written; empty: out
    speed: int = 0                                         # time the full captions of so many poses instead
    check: list[str] = field(default_factory=list)         # KIND:PATH, a data set to count, measure and draw
    build: str = ""                                        # imagescript | imagediff
    poses: list[str] = field(default_factory=list)         # --build: KIND:PATH, where poses come from
    quota: list[str] = field(default_factory=list)         # --build: SOURCE=NUMBER[:SPLIT], how many; none: all
    features: str = ""                                     # imagediff: what eval.py --features makes of these --poses
    differ: int = 10                                       # imagediff: least number of codes that differ in a pair
    refine: str = ""                                       # --build: folder of a chat model that rewrites texts
    refined: int = 0                                       # --refine: of so many rows, drawn evenly; 0: of all


def main(argv=None):
    """Prints one example of each task and saves a sheet of photographs, or checks or builds a data set."""
    config = cli(Config, argv)
    config.out = pathlib.Path(config.out or f"out/{config.build}")
    if config.build not in ("", "imagescript", "imagediff") or min(config.differ, config.refined) < 0:
        raise UserError("--build is imagescript or imagediff, --differ and --refined are numbers from 0 on")
    if config.build or config.check:
        return build(config) if config.build else summarise(read_records(config.check), config.out / "check.png")
    if config.speed > 0:
        import resource  # not on Windows

        poses, start = itertools.cycle(sample_people(config.split, 10_000)[1]), time.process_time()
        said = sum(len(text.split()) for text in full_captions(itertools.islice(poses, config.speed), config.seed))
        rate, peak = config.speed / (time.process_time() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return print(f"{rate:,.0f} captions of {said / config.speed:.0f} words in a second of processor time, "
                     f"at most {peak / 1024:,.0f} MB of memory")
    world = World(config.split, 64)
    for task in TASKS:
        print(f"\n{task}")
        for kind, value, is_target in Mixture([task], config.seed, world)[0][1]:
            shown = value.strip() if kind == "text" else f"<{kind}> {' x '.join(map(str, value.shape))}"
            print(f"  {'->' if is_target else '  '} {shown}")
    rows = [np.concatenate([world.image(i) for i in range(k, k + 8)], 1) for k in range(0, 32, 8)]
    with atomic_write(config.out / "world.png") as path:
        Image.fromarray(np.concatenate(rows)).save(path, format="PNG")
    joints = forward_kinematics(World(config.split, 4000).poses, rest_joints())
    apart = 1000 * (joints[0::2] - joints[1::2]).norm(dim=-1).mean()
    print(f"\n{len(activity_table().activities)} activities, {len(vocabulary())} words, {len(TASKS)} x {N_TEMPLATES} instructions; "
          f"the two of a pair are {apart:.0f} mm apart (2,000 pairs); 32 of them: {config.out / 'world.png'}")


if __name__ == "__main__":
    run_main(main)
