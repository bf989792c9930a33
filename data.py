"""Training data: seven tasks over synthetic people, their captions and their photographs.

A training example is a function of two numbers, (seed, k): they seed the generator that draws its
task, person, instruction and wording. Nothing is stored and nothing is shuffled; a run that resumes
at step k asks for example k.

    person i = f(split, i)                            example k = f(seed, k)

    "tree pose" (activities.json)                     task       text2pose
        | draw angles                                 person     i
        v                                             template   "Create the pose that fits this
    rotmat (22,3,3) ---> "The left knee is ..."                   text. <caption>"
        | turn, dress, light                          segments   ("text", "Create ...", False)
        v                                                        ("text", "The left ...", False)
    photograph (S,S,3)                                           ("pose", rotmat, True)

Segments (kind, value, is_target) of kind "text", "pose" or "image" are all that the model sees of
this file; is_target marks the answer. Persons 2i and 2i+1 are a pair, the second an edit of the
first: posediff, imagediff and edit are about the way from one to the other. Captions are computed
from poses (captions.py), so whether an answer is true can be computed as well. Questions are
worded as people type them (section 4).

Real data sets enter through section 7, as plain records of what each entry holds; train.py mixes
them. Section 8 rebuilds the paper's ImageScript and ImageDiff from any poses.

Letters: M people, C=27 angles of a synthetic person, J=22 joints, V vertices, F faces, S pixels.

Left out: hands, faces, body shapes, motion, and people who hide each other.

    python data.py                   # one example of each task, and out/world.png: 32 photographs
    python data.py --speed 10000     # how fast the full captions are, and in how much memory
    python data.py --check amass:/data/AMASS/CMU           # real data: counts, ranges, a picture
    python data.py --build imagescript --poses world:train:2000 --quota world=500
"""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import sys
import tarfile
import textwrap
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

from captions import (
    PAIR, VIEWS, add_view, caption, caption_words, choose_codes, difference, eligible_codes,
    find_keypoints, full_caption, full_captions, is_true, join_words, keypoint_ids, measure,
    name_sides, paircodes, pose_table, posecodes, rest_joints, share_true, statements, to_text,
)
from tokenizer import (
    JOINTS, MAX_BYTES, PARENTS, Z_UP_TO_Y_UP, Record, UserError, aa_to_matrix, as_user_error,
    atomic_write, cli, face_front, file_errors, first_line, forward_kinematics, list_files,
    list_to_array, load_asset, load_body, load_json, load_pickle, matrix_to_aa, mirror, read_arrays,
    read_pickle, read_torch_file, require_file, run_main, shorten, skip_bad_entry, to_array,
    to_element, turn_root,
)


# ---- 1. Seven tasks and their templates ----------------------------------------------------------
class Task(NamedTuple):
    """One task in one row: all that training, sampling and evaluation know about it.

    A new task needs a row of TASKS and instructions in assets/instructions.json; also a method of
    `World`, if none writes its text yet.
    """

    inputs: tuple           # "pose" | "image" | "text", in the order of the slots of its templates
    target: str             # "pose" | "text"
    text: str = "caption"   # the method of `World` that writes its text
    typed: str = ""         # the method that writes it in training prompts, if it is another one
    frame: str = "body"     # poses face +z ("body") or stand as the camera sees them ("camera")
    pair: bool = False      # about person A and the edit of A, person B; the target is about B
    group: bool = False     # about one of several people: its text is a question that says whom
    turn: bool = False      # a turn of a conversation, after those of `World.history`
    stage: str = "instruct"  # the last that teaches it: "reason" asks for thought; "": none does


TASKS = {
    # UniPose table 1: comprehension, generation, editing
    "pose2text": Task(("pose",), "text"),
    "posediff": Task(("pose", "pose"), "text", text="difference", pair=True),
    "image2text": Task(("image",), "text", text="image_caption"),
    "imagediff": Task(("image", "image"), "text", text="difference", pair=True),
    "text2pose": Task(("text",), "pose", typed="user_prompt"),
    "image2pose": Task(("image",), "pose", frame="camera"),
    "edit": Task(("pose", "text"), "pose", text="difference", typed="edit_prompt", pair=True),

    # text-enhanced pose estimation (UniPose figure 5)
    "image_text2pose": Task(("image", "text"), "pose", frame="camera", stage=""),

    # text2pose as people type it, in phrases that are held out
    "request": Task(("text",), "pose", text="request", stage=""),

    # reasoning-based pose estimation (UniPose appendix D): who of several people? The question is
    # first, so that each patch of the picture, which sees only what is before it, can answer it
    "reason": Task(
        ("text", "image"), "pose", text="question", frame="camera", group=True, stage="reason"),
    "reason_text": Task(("text", "image"), "text", text="question", group=True, stage="reason"),

    # speculative pose generation (ChatPose): the text implies a pose
    "speculate": Task(("text",), "pose", text="speculation", stage="reason"),

    # conversation
    "chat_edit": Task(
        ("text",), "pose", text="difference", typed="edit_prompt", pair=True, turn=True,
        stage="reason"),
    "chat_describe": Task((), "text", turn=True, stage="reason"),
    "chat_compare": Task((), "text", text="difference", pair=True, turn=True, stage="reason"),
}
SEVEN = tuple(task for task, row in TASKS.items() if row.stage == "instruct")
REASONING = tuple(task for task, row in TASKS.items() if row.stage == "reason")
SLOT = re.compile(r"(<\w+>)")                              # where a template takes an input
N_TEMPLATES = 200                                          # per task, as in the paper


def answerable(tasks, pose_head):
    """Those of some tasks that a model of this pose head takes: without codes it reads no poses."""
    return [task for task in tasks if pose_head == "codes" or "pose" not in TASKS[task].inputs]


def slots(task):
    """The slots of a task's templates, in order: ["<poseA>", "<poseB>"] for posediff."""
    inputs = TASKS[task].inputs
    names = []
    for position, kind in enumerate(inputs):
        name = "caption" if kind == "text" else kind
        if inputs.count(kind) > 1:
            name += "AB"[position]
        names.append(f"<{name}>")
    return names


def expand_pattern(pattern, lists):
    """All sentences of a pattern: each {word} in it stands for any entry of lists["word"]."""
    word = re.search(r"\{(\w+)\}", pattern)
    if not word:
        return [tidy_sentence(pattern)]

    sentences = []
    for entry in lists[word[1]]:
        sentences += expand_pattern(pattern.replace(word[0], entry, 1), lists)
    return sentences


def tidy_sentence(text):
    """Capital letters at the start of sentences, no spaces before . , ? and no double ones."""
    text = " ".join(text.split())
    text = re.sub(r" ([.,?])", r"\1", text)
    return re.sub(r"(^|[.?] |<caption> )([a-z])", lambda start: start[1] + start[2].upper(), text)


@functools.cache
def templates(task):
    """The distinct instructions of a task, a tuple; the first is the plain one.

    There are 200 of each of the seven tasks, fewer where the text itself says what is asked for.
    assets/instructions.json holds a grammar, a few patterns per task (see `expand_pattern`).
    """
    if task in ("request", "speculate"):                   # asked as any text is
        task = "text2pose"
    grammar = load_asset("instructions")
    row = grammar["tasks"][task]
    expanded = []
    for pattern in row["patterns"]:
        sentences = expand_pattern(pattern, grammar["lists"])
        rng = np.random.default_rng(0)
        expanded.append(rng.permutation(sentences).tolist())

    # the patterns take turns, so that already the first few templates differ in form
    lines = [row["plain"]]
    for turn in itertools.zip_longest(*expanded):
        lines += [line for line in turn if line]
    distinct = list(dict.fromkeys(lines))
    return tuple(distinct[:N_TEMPLATES])


def task_values(task, value_of):
    """The inputs of a task in order, then its target.

    value_of(kind, which) gives one value: `which` is 0 for A or for the only person, 1 for B.
    """
    row = TASKS[task]
    values = []
    for position, kind in enumerate(row.inputs):
        which = row.inputs[:position].count(kind)          # the second pose, or image, is B's
        values.append(value_of(kind, which))
    values.append(value_of(row.target, int(row.pair)))
    return values


def render_template(task, values, template):
    """Fills a template with an example: a list of segments (kind, value, is_target), target last.

    values: the task's inputs in order, then its target. The template is split at its slots before
    anything is filled in, so a caption that contains "<pose>" stays text.
    """
    row = TASKS[task]
    inputs = {}
    for slot, kind, value in zip(slots(task), row.inputs, values):
        inputs[slot] = (kind, value, False)

    segments = []
    for piece in SLOT.split(template):
        if piece in inputs:
            segments.append(inputs[piece])
        elif piece:
            segments.append(("text", piece, False))

    # where a pose is asked for, that nobody fits is said in words
    kind = "text" if isinstance(values[-1], str) else row.target
    segments.append((kind, values[-1], True))
    return segments


# ---- 2. Synthetic people -------------------------------------------------------------------------
# A person is C = 27 angles. An activity of assets/activities.json holds ranges for them:
#
#   activity --choose gestures--> ranges (M,2,C) --draw--> angles (M,C) --limit--> rotmat (M,22,3,3)
#
# Every second person is an edit of the one before, with one to three body parts drawn anew.
#
# People are wide: real ones do two things at once, and most of the time something between two. Of
# ten people five show one activity, two show one with the arms and another with the legs, and three
# show none: their limbs are of several activities, on the way to several others, and some of them
# float any way up. All are loose: angles and joints move a little, of those who show none far more.
# The split "test" is older, and stays: its people are stiff and do one of the first 48 activities.
LIMBS = ["left_leg", "right_leg", "left_arm", "right_arm"]
BODY_PARTS = ["root", "trunk", "head", *LIMBS]
LOW_MOTION_JOINTS = [JOINTS.index(name) for name in (
    "left_collar", "left_foot", "left_wrist", "right_collar", "right_foot", "right_wrist")]

SIDES = ["", "left", "right"]            # numbers 0, 1 and -1: mirroring changes the sign
NONE = -1                                # the activity of people of no activity
IS_UPPER = np.isin(BODY_PARTS, ["head", "left_arm", "right_arm"])             # (7,)

# What an edit reads in activities.json in place of a part's own entry
EDIT_ENTRIES = {"trunk": "edit_trunk", "left_leg": "edit_legs", "right_leg": "edit_legs",
                "left_arm": "edit_arms", "right_arm": "edit_arms"}
ALIKE = 15                               # degrees: gestures that differ less look alike
EDIT_WEIGHTS = {"trunk": 2, "left_leg": 2, "left_arm": 1, "right_arm": 1}   # the right leg stands
N_EDITS_CDF = (0.10, 0.40)               # P(one part is edited), P(at most two); at most three are
VIEW_CDF = (0.7, 0.8, 0.9)               # P(front), P(front or right) ...; the rest: left
SPLIT_SIZE = 1 << 20                     # people of a split, at most
SPLITS = {                               # numbers of their first people
    "train": 0,
    "val": SPLIT_SIZE,
    "test": 2 * SPLIT_SIZE,
    "test_wide": 3 * SPLIT_SIZE,
}
NARROW = "test"                          # as when the first weights were made
N_NARROW = 48                            # activities of its people, the first of the table
KINDS_CDF = (0.5, 0.7)                   # P(one activity), P(one or two); the rest: none
SHARE_OF_ONE_DRAW = 0.7                  # of people of no activity: both legs, or both arms, match
SHARE_OF_WHOLE = 0.5                     # of people of no activity: all of the body does
SHARE_OF_ANY_ROOT = 0.15                 # of people of no activity: they float any way up
LOOSENESS = (0.3, 1.0)                   # at most: of people of an activity, and of none

# A person is made from a row of 256 random numbers, a narrow one from the first 96 of them. Every
# row uses these columns,
N_UNIFORMS = 256
U_ACTIVITY = 0
U_MIRROR = 1
U_VIEW = 2
U_HEADING = 3
# the first person of a pair these,
U_FRESH = slice(4, 35)                   # 4 gestures, 27 angles
U_NOISE = slice(35, 62)                  # 27 angles
U_LOW_MOTION = slice(78, 96)             # 6 joints, 3 turns each
# and the second, its edit, these.
U_EDIT_PARTS = slice(4, 11)              # 7 body parts
U_N_EDITS = 11
U_EDIT_HEAD = 12
U_DRAFT_1 = slice(13, 44)                # 4 gestures, 27 angles
U_DRAFT_2 = slice(44, 75)
# Wide people use these besides, of the first person of a pair.
U_KIND = 96
U_TWO = slice(97, 99)                    # the activity of the arms, that of the legs
U_NAMED = 99                             # which of both is named
U_PARTS_1 = slice(100, 107)              # 7 body parts
U_PARTS_2 = slice(107, 114)
U_MATCH_1 = slice(114, 117)              # right leg, right arm, all
U_MATCH_2 = slice(117, 120)
U_SWAP = slice(120, 123)                 # arms, arms of the second draft, all of the second draft
U_BLEND = 123
U_ANY_ROOT = slice(124, 127)
U_LOOSENESS = 127
U_SECOND = slice(128, 159)               # 4 gestures, 27 angles
U_SPREAD = slice(159, 186)               # 27 angles
U_LOOSE = slice(186, 252)                # 22 joints, 3 turns each


def hash_uniform(rows, n):
    """Row numbers (M,) -> (M,n) numbers in [0,1), each a pure function of its row and column.

    A hash of a counter (splitmix64, Steele et al. 2014) instead of a generator per row: a row never
    depends on which others are drawn, and all rows are computed at once.
    """
    column = np.arange(1, n + 1, dtype=np.uint64)
    z = np.asarray(rows, np.uint64)[:, None] * (1 << 16) + column             # (M,n)
    z = z * 0x9E3779B97F4A7C15                             # wraps around at 2^64, as it should
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return (z >> 11) / float(1 << 53)                      # 53 bits: the precision of a double


class JointTurn(NamedTuple):
    """One angle turns one joint about one axis."""

    order: int              # a joint has up to three turns; number 0 is multiplied from the left
    joint: int
    axis: int               # 0 x, 1 y, 2 z
    column: int             # of the angle
    scale: float            # radians of the turn per degree of the angle


class Drawn(NamedTuple):
    """People as they were drawn, before joint limits."""

    activity: np.ndarray    # (M,) which of the table's activities they show; NONE: no one
    side: np.ndarray        # (M,) the side of that activity: 1 left, -1 right, 0 none
    parts: np.ndarray       # (M,7) from which activity each of BODY_PARTS is
    angles: np.ndarray      # (M,C) degrees
    looseness: np.ndarray   # (M,) 0..1: the share of "spread" and "loose" that is added


class ActivityTable:
    """assets/activities.json as arrays, and the steps from random numbers to poses.

    angles: C tuples (body part, name); columns: {body part: slice of its angles}; limits (C,2) and
    narrow_limits (C,2), degrees; spread (C,), loose (22,2,3): what is added to the angles and to
    the joints of loose people, degrees; turns: list of JointTurn; activities: A names; sides (A,);
    by_arms, by_legs: the activities that arms and head show, or the other parts; cdf (A,): how
    often they are drawn; fresh_ranges, edit_ranges: per activity {body part: (G,2,c)}, the lowest
    and the highest angles of each of the G gestures that the part chooses from.
    """

    def __init__(self):
        table = load_asset("activities")
        self.angles = []
        self.columns = {}
        narrow_limits = []
        limits = []
        spread = []
        for part in BODY_PARTS:
            kind = part.split("_")[-1]                     # left and right limbs share their limits
            start = len(self.angles)
            self.angles += [(part, angle) for angle in table["limits"][kind]]
            self.columns[part] = slice(start, len(self.angles))
            narrow_limits += table["limits"][kind].values()
            limits += (table["limits"][kind] | table["wide_limits"][kind]).values()
            spread += [table["spread"][kind][angle] for angle in table["limits"][kind]]
        self.narrow_limits = np.array(narrow_limits, np.float64)
        self.limits = np.array(limits, np.float64)
        self.spread = np.array(spread, np.float64)
        self.loose = self.read_loose(table["loose"])
        assert len(self.angles) == 27, "U_FRESH and its neighbours are laid out for 27 angles"

        self.turns = self.read_turns(table["axes"])
        self.activities = list(table["activities"])
        self.fresh_ranges = []
        self.edit_ranges = []
        sides = []
        shown_by = []
        weights = []
        for row in table["activities"].values():
            row = table["usual"] | row
            self.fresh_ranges.append(self.read_ranges(table, row, {}))
            self.edit_ranges.append(self.read_ranges(table, row, EDIT_ENTRIES))
            sides.append(SIDES.index(row.get("side", "")))
            shown_by.append(row.get("shown_by", ""))
            weights.append(row.get("weight", 1.0))
        self.sides = np.array(sides)
        self.by_arms = np.flatnonzero(np.array(shown_by) == "arms")
        self.by_legs = np.flatnonzero(np.array(shown_by) == "legs")
        self.cdf = np.cumsum(weights)

    def at(self, angle):
        """The columns of an angle: at("knee") -> those of both legs."""
        return [column for column, (_, name) in enumerate(self.angles) if name == angle]

    def read_turns(self, axes):
        """A list of JointTurn from the table of axes; `about` of activities.json has its format."""
        turns = []
        for joint, rows in axes.items():
            for order, (part, angle, (sign, letter), share) in enumerate(rows):
                axis = "xyz".index(letter)
                scale = math.radians(share)
                if sign == "-":
                    scale = -scale
                column = self.angles.index((part, angle))
                turns.append(JointTurn(order, JOINTS.index(joint), axis, column, scale))
        return turns

    def read_loose(self, rows):
        """The turns that joints are free to add: (22,2,3), degrees; 0 where the table has none."""
        ranges = np.zeros((len(JOINTS), 2, 3))
        for joint, axes in rows.items():
            low_high = np.array(axes, np.float64).T                           # (2,3)
            for j, name in enumerate(JOINTS):
                if name.removeprefix("left_") == joint:
                    ranges[j] = low_high
                elif name == f"right_{joint}":
                    ranges[j] = low_high * [1, -1, -1]     # the mirror image turns the other way
        return ranges

    def read_ranges(self, table, row, entries):
        """The ranges of one activity: {body part: (G,2,c)}.

        entries: {body part: its entry in the row}, if it is not the one of its own name.
        """
        ranges = {}
        for part in BODY_PARTS:
            entry = row.get(entries.get(part, part), {})
            gestures = [entry]
            if part in LIMBS:
                known = table["gestures"][part.split("_")[-1]]
                names = expand_sets(entry, table["sets"])
                gestures = [known[name] for name in names]
            arrays = [self.range_of(part, gesture) for gesture in gestures]
            ranges[part] = np.stack(arrays)
        return ranges

    def range_of(self, part, gesture):
        """{angle: [low, high]} of a body part -> (2,c): 0 where left out, NaN for a level foot."""
        rows = []
        for _, angle in self.angles[self.columns[part]]:
            default = np.nan if angle == "point" else 0.0
            rows.append(gesture.get(angle, [default, default]))
        return np.array(rows, np.float64).T

    def draw(self, ranges, parts, u):
        """Draws people of which each body part may be from another activity.

        parts (M,7): those activities; random numbers (M,4+C) -> angles (M,C), each within its
        range. ranges: `fresh_ranges` or `edit_ranges`.
        """
        bounds = np.zeros((len(u), 2, len(self.angles)))                      # (M,2,C)
        for p, part in enumerate(BODY_PARTS):
            for a in np.unique(parts[:, p]):
                rows = np.flatnonzero(parts[:, p] == a)
                gestures = ranges[a][part]                                    # (G,2,c)
                chosen = np.zeros(len(rows), int)
                if part in LIMBS:
                    lot = u[rows, LIMBS.index(part)]                          # (m,) in [0,1)
                    chosen = (lot * len(gestures)).astype(int)
                bounds[rows, :, self.columns[part]] = gestures[chosen]
        low = bounds[:, 0]
        high = bounds[:, 1]
        return low + u[:, 4:] * (high - low)

    def draw_activity(self, u, n=None):
        """Random numbers (...) -> activities (...), out of the first n of the table."""
        cdf = self.cdf[:n]
        return np.searchsorted(cdf / cdf[-1], u, side="right")

    def draw_narrow(self, u):
        """Random numbers of people who are no edits (M,256) -> Drawn, as `NARROW` needs them."""
        activity = self.draw_activity(u[:, U_ACTIVITY], N_NARROW)
        parts = activity[:, None].repeat(len(BODY_PARTS), 1)                  # (M,7)
        angles = self.draw(self.fresh_ranges, parts, u[:, U_FRESH])
        angles += 4 * u[:, U_NOISE] - 2                    # up to 2 degrees of noise
        return Drawn(activity, self.sides[activity], parts, angles, np.zeros(len(u)))

    def draw_wide(self, u):
        """Random numbers of people who are no edits (M,256) -> Drawn: of one, two or no activity.
        """
        kind = np.searchsorted(KINDS_CDF, u[:, U_KIND], side="right")         # (M,)
        activity = self.draw_activity(u[:, U_ACTIVITY])
        side = self.sides[activity]
        parts = activity[:, None].repeat(len(BODY_PARTS), 1)                  # (M,7)

        # two activities: the arms and the head show one, the rest of the body the other
        two = kind == 1
        arms = self.by_arms[(u[two, U_TWO.start] * len(self.by_arms)).astype(int)]
        legs = self.by_legs[(u[two, U_TWO.stop - 1] * len(self.by_legs)).astype(int)]
        is_swapped = u[:, U_SWAP.start] < 0.5
        is_arms = u[two, U_NAMED] < 0.5
        parts[two] = np.where(IS_UPPER, arms[:, None], legs[:, None])
        activity[two] = np.where(is_arms, arms, legs)
        arms_side = np.where(is_swapped[two], -1, 1) * self.sides[arms]
        side[two] = np.where(is_arms, arms_side, self.sides[legs])

        # none: every limb is from another activity
        free = kind == 2
        parts[free] = self.mix_parts(u[free, U_PARTS_1], u[free, U_MATCH_1])
        activity[free] = NONE
        side[free] = 0
        angles = self.draw(self.fresh_ranges, parts, u[:, U_FRESH])           # (M,C)
        is_swapped &= kind > 0
        angles[is_swapped] = self.swap_arms(angles[is_swapped])

        # ... and on its way to yet another
        angles[free] = self.blend(angles[free], u[free])
        looseness = u[:, U_LOOSENESS] * np.where(free, LOOSENESS[1], LOOSENESS[0])
        angles += self.spread_of(u, looseness)
        return Drawn(activity, side, parts, angles, looseness)

    def mix_parts(self, u, u_match):
        """Random numbers (M,7), (M,3) -> an activity for each body part (M,7).

        The trunk and the left leg follow the root, or nobody would keep the balance.
        """
        parts = self.draw_activity(u)                                         # (M,7)
        root, trunk, _, left_leg, right_leg, left_arm, right_arm = range(len(BODY_PARTS))
        parts[:, [trunk, left_leg]] = parts[:, [root]]
        legs_match, arms_match = (u_match[:, :2] < SHARE_OF_ONE_DRAW).T       # (M,)
        is_whole = u_match[:, 2] < SHARE_OF_WHOLE                             # (M,)
        parts[legs_match, right_leg] = parts[legs_match, left_leg]
        parts[arms_match, right_arm] = parts[arms_match, left_arm]
        parts[is_whole] = parts[is_whole][:, [root]]
        return parts

    def blend(self, angles, u):
        """Moves people of no activity part of the way to others -> angles (M,C).

        angles (M,C), random numbers (M,256).
        """
        parts = self.mix_parts(u[:, U_PARTS_2], u[:, U_MATCH_2])
        goal = self.draw(self.fresh_ranges, parts, u[:, U_SECOND])            # (M,C)
        _, swaps_arms, swaps_all = (u[:, U_SWAP] < 0.5).T                     # (M,)
        goal[swaps_arms] = self.swap_arms(goal[swaps_arms])
        goal[swaps_all] = self.mirror(goal[swaps_all])

        share = u[:, [U_BLEND]] ** 2                       # of the way, less than half mostly
        angles = self.level_feet(angles)
        angles += share * (self.level_feet(goal) - angles)

        # some float any way up
        any_root, u_roll, u_pitch = u[:, U_ANY_ROOT].T
        floats = any_root < SHARE_OF_ANY_ROOT
        roll = np.degrees(np.arcsin(2 * u_roll - 1))       # evenly over the sphere
        pitch = 360 * u_pitch - 180
        root = np.stack([roll, pitch], 1)                                     # (M,2)
        angles[floats, self.columns["root"]] = root[floats]
        return angles

    def spread_of(self, u, looseness):
        """What is added to the angles of loose people (M,C): u (M,256), looseness (M,)."""
        return (2 * u[:, U_SPREAD] - 1) * looseness[:, None] * self.spread

    def swap_arms(self, angles):
        """Angles (M,C) with those of the left arm and of the right arm exchanged."""
        left = self.columns["left_arm"]
        right = self.columns["right_arm"]
        angles = angles.copy()
        angles[:, left], angles[:, right] = angles[:, right], angles[:, left].copy()
        return angles

    def mirror(self, angles):
        """Angles (M,C) of the mirror images."""
        angles = self.swap_arms(angles)
        left = self.columns["left_leg"]
        right = self.columns["right_leg"]
        angles[:, left], angles[:, right] = angles[:, right], angles[:, left].copy()
        for part, angle in (("root", "roll"), ("trunk", "turn"), ("trunk", "lean"),
                            ("head", "turn"), ("head", "tilt")):
            angles[:, self.angles.index((part, angle))] *= -1
        return angles

    def looks_like(self, activity, parts, angles):
        """Could a person of these angles (C,) be of an activity, by the look of some body parts?

        parts: names of BODY_PARTS. Each must be within ALIKE degrees of a gesture of the activity,
        or all of them of one mirrored.
        """
        ranges = self.fresh_ranges[self.activities.index(activity)]

        def is_alike(part, shown):
            low = ranges[part][:, 0] - ALIKE                                  # (G,c)
            high = ranges[part][:, 1] + ALIKE
            values = angles[self.columns[shown]]                              # (c,)
            is_outside = (values < low) | (values > high)  # false for the NaN of a level foot
            return bool((~is_outside).all(1).any())

        as_drawn = all(is_alike(part, part) for part in parts)
        mirrored = all(is_alike(part, other_side(part)) for part in parts)
        return as_drawn or mirrored

    def edit(self, drawn, u):
        """Redraws one to three parts of each person, sometimes the head as well.

        drawn: Drawn of M people; random numbers (M,256) -> angles (M,C).
        """
        # weighted sampling without replacement: the items with the largest keys u^(1/weight) are
        # the sample (Efraimidis & Spirakis 2006)
        weights = np.array([EDIT_WEIGHTS.get(part, 0.001) for part in BODY_PARTS])
        keys = u[:, U_EDIT_PARTS] ** (1 / weights)                            # (M,7)
        rank = keys.argsort(1).argsort(1)                                     # (M,7) 6: largest
        n_edits = 1 + np.searchsorted(N_EDITS_CDF, u[:, [U_N_EDITS]])         # (M,1)
        is_edited = rank >= len(BODY_PARTS) - n_edits                         # (M,7)
        is_edited[:, BODY_PARTS.index("head")] = u[:, U_EDIT_HEAD] < 0.4

        draft_1 = self.draw(self.edit_ranges, drawn.parts, u[:, U_DRAFT_1])   # (M,C)
        draft_2 = self.draw(self.edit_ranges, drawn.parts, u[:, U_DRAFT_2])   # (M,C)
        spread = self.spread_of(u, drawn.looseness)                           # (M,C)
        result = drawn.angles.copy()
        for p, part in enumerate(BODY_PARTS):
            columns = self.columns[part]
            before = drawn.angles[:, columns]                                 # (M,c)
            first = draft_1[:, columns]
            second = draft_2[:, columns]

            # the draft that moves the part further: an edit should be visible
            move_1 = np.nansum(np.abs(first - before), 1, keepdims=True)      # (M,1)
            move_2 = np.nansum(np.abs(second - before), 1, keepdims=True)
            after = np.where(move_2 > move_1, second, first) + spread[:, columns]
            result[:, columns] = np.where(is_edited[:, [p]], after, before)
        return result

    def level_feet(self, angles):
        """Angles (M,C) with the NaN of a level foot replaced by what makes its sole level."""
        angles = angles.copy()
        feet = angles[:, self.at("point")]
        level = angles[:, self.at("flex")] - angles[:, self.at("knee")]
        angles[:, self.at("point")] = np.where(np.isnan(feet), level, feet)
        return angles

    def apply_joint_limits(self, angles, limits):
        """Angles (M,C) as drawn -> made possible: soles level, hips bowed, all within limits (C,2).
        """
        angles = self.level_feet(angles)
        flex = self.at("flex")
        hips = angles[:, flex]                                                # (M,2)
        hinge = angles[:, self.at("hinge")]                                   # (M,1)

        # a seated person cannot bow far: the hips are bent already
        room = limits[flex, 1] - hips                                         # (M,2)
        hinge = np.minimum(hinge, room.min(1, keepdims=True))
        angles[:, flex] = hips + hinge
        angles[:, self.at("hinge")] = hinge
        low, high = limits.T
        return angles.clip(low, high)

    def rotations(self, angles, loose):
        """Angles within limits (M,C) -> rotmat (M,22,3,3) float32.

        loose (M,22,3): axis-angles of further turns of the joints, degrees.
        """
        angles = angles.copy()
        angles[:, self.at("raise")] -= 90                  # at rest the arms are level: a T
        angles[:, self.at("pitch")] += angles[:, self.at("hinge")]

        turns = np.zeros((3, len(JOINTS), 3, len(angles)))                    # (3,22,3,M)
        for order, joint, axis, column, scale in self.turns:
            turns[order, joint, axis] += scale * angles[:, column]
        turns[2] += np.radians(loose).transpose(1, 2, 0)
        turns = torch.tensor(turns).float().permute(0, 3, 1, 2)               # (3,M,22,3)
        first, second, third = aa_to_matrix(turns)                            # (M,22,3,3)
        return first @ second @ third

    def loose_turns(self, u, looseness):
        """The further turns of the joints of loose people (M,22,3), degrees.

        Random numbers (M,256), looseness (M,). Collars, feet and wrists always turn a little.
        """
        loose = np.zeros((len(u), len(JOINTS), 3))
        loose[:, LOW_MOTION_JOINTS] = (6 * u[:, U_LOW_MOTION] - 3).reshape(-1, 6, 3)
        low = self.loose[:, 0]                                                # (22,3)
        high = self.loose[:, 1]
        wide = low + u[:, U_LOOSE].reshape(-1, len(JOINTS), 3) * (high - low)
        return loose + looseness[:, None, None] * wide


def other_side(part):
    """The body part on the other side: "left_leg" -> "right_leg", "trunk" -> "trunk"."""
    side, _, limb = part.partition("_")
    return {"left": f"right_{limb}", "right": f"left_{limb}"}.get(side, part)


def expand_sets(names, sets):
    """Names of gestures and of sets of gestures -> names of gestures."""
    gestures = []
    for name in names:
        gestures += sets.get(name, [name])
    return gestures


activity_table = functools.cache(ActivityTable)            # read once


class People(NamedTuple):
    """Some people of a split. Rows 2i and 2i+1 are a pair: the second is an edit of the first."""

    activity: np.ndarray    # (n,) indices, NONE: of no activity
    poses: torch.Tensor     # (n,22,3,3), facing +z
    headings: np.ndarray    # (n,) radians
    sides: list             # n entries of SIDES: which side of the body the activity is on
    angles: np.ndarray      # (n,C) as they were drawn, before some are mirrored


def sample_people(split, n):
    """The first n people of a split, n even: People.

    Half of the pairs are mirrored, because the activities of the table are one-sided. Raises
    UserError.
    """
    if split not in SPLITS or n % 2 or not 2 <= n <= SPLIT_SIZE:
        raise UserError(f"cannot draw {n} people of split {split!r}: the splits are "
                        f"{', '.join(SPLITS)}; people come in pairs, 2 to {SPLIT_SIZE} of them")
    table = activity_table()
    u = hash_uniform(SPLITS[split] + np.arange(n), N_UNIFORMS)                # (n,256)
    even = u[0::2]                                                            # (n/2,256)
    odd = u[1::2]

    is_narrow = split == NARROW
    drawn = table.draw_narrow(even) if is_narrow else table.draw_wide(even)
    edited = table.edit(drawn, odd)                                           # (n/2,C)
    angles = np.stack([drawn.angles, edited], 1).reshape(n, -1)               # (n,C)
    limits = table.narrow_limits if is_narrow else table.limits
    possible = table.apply_joint_limits(angles, limits)                       # (n,C)

    loose = table.loose_turns(even, drawn.looseness).repeat(2, 0)             # (n,22,3)
    rotmat = table.rotations(possible, loose)                                 # (n,22,3,3)
    is_mirrored = (even[:, U_MIRROR] < 0.5).repeat(2)                         # (n,)
    rotmat[is_mirrored] = mirror(rotmat[is_mirrored])
    side = np.where(is_mirrored, -1, 1) * drawn.side.repeat(2)                # (n,)

    view = np.searchsorted(VIEW_CDF, u[:, U_VIEW], side="right")              # (n,)
    deviation = (2 * u[:, U_HEADING] - 1) * math.radians(35)
    heading = view * math.pi / 2 + deviation
    heading = (heading + math.pi) % (2 * math.pi) - math.pi
    sides = [SIDES[s] for s in side]
    return People(drawn.activity.repeat(2), rotmat, heading, sides, angles)


# ---- 3. The renderer, and photographs ------------------------------------------------------------
LIGHT = np.array([-0.41, 0.68, 0.60])                      # to the lamp: left, above, in front
DISTANCE = 5.0                                             # of the camera from the person, metres
PITCH = 0.16                                               # how far it looks down, radians
CLOTHES = {
    "skin": (0.87, 0.68, 0.57),
    "hair": (0.20, 0.14, 0.11),
    "shirt": (0.93, 0.91, 0.86),
    "trousers": (0.47, 0.50, 0.56),
    "shoes": (0.26, 0.26, 0.29),
}
WORN = {                                                   # all other joints wear the shirt
    "pelvis": "trousers", "hip": "trousers", "knee": "trousers", "ankle": "shoes", "foot": "shoes",
    "neck": "skin", "head": "skin", "wrist": "skin", "hand": "skin",
}
SIDE_TINTS = {"left": (0.93, 0.47, 0.24), "right": (0.20, 0.52, 0.82)}      # left warm, right cool
TINTED = ("hip", "knee", "shoulder", "elbow")              # hands and feet keep their colour
HEAD = JOINTS.index("head")


def body_colors(body, sides=0.75, **clothes):
    """The colours of a dressed body, one per vertex: (V,3) in 0..1.

    Dark hair tells the front from the back, tinted limbs tell left from right. sides: the strength
    of the tint, 0 for none. clothes: entries of CLOTHES to replace, as rgb.
    """
    clothes = {**CLOTHES, **clothes}
    palette = []
    for name in [*JOINTS, "left_hand", "right_hand"]:
        side, _, part = name.rpartition("_")
        color = np.array(clothes[WORN.get(part, "shirt")])
        if side in SIDE_TINTS and part in TINTED:
            color = color + sides * (SIDE_TINTS[side] - color)
        palette.append(color)

    # cubed skinning weights: hems half as wide as the blending of the skin
    share = body.weights.cpu().numpy() ** 3                                   # (V,24)
    colors = share @ np.array(palette) / share.sum(1, keepdims=True)          # (V,3)

    # hair behind the ears, above the forehead and on the crown; heights from the head joint
    on_head = body.weights[:, HEAD].cpu().numpy() > 0.5                       # (V,)
    place = (body.template - body.rest[HEAD]).cpu().numpy()                   # (V,3)
    height = place[:, 1]
    top = height[on_head].max()
    hairline = 0.05 - 0.9 * (0.85 * top - height).clip(0)                     # (V,)
    is_hair = (height > 0.15 * top) & (place[:, 2] < hairline)
    is_hair = on_head & (is_hair | (height > 0.82 * top))
    colors[is_hair] = clothes["hair"]
    return colors


def rotation_y(angle):
    """Rotation matrix about the vertical: pi/2 turns a person who faces +z to face +x."""
    c = math.cos(angle)
    s = math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def view_from_camera(points, center):
    """Points (n,3) -> metres in the picture's plane (n,2), y down; depth (n,), larger is nearer.

    The camera looks at `center` from DISTANCE, PITCH from above.
    """
    c = math.cos(PITCH)
    s = math.sin(PITCH)
    look_down = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    x, y, z = ((points - center) @ look_down.T).T
    perspective = DISTANCE / (DISTANCE - z)                # mild: near limbs are a little larger
    plane = np.stack([x, -y], 1) * perspective[:, None]
    return plane, z


def project(points, frame, size, zoom, shift):
    """Points (n,3) -> pixels (n,2) and depth (n,) in a picture of size x size that holds `frame`.

    The points `frame` (m,3) fill three quarters of the picture's width or 0.92 of its height,
    whichever comes first. zoom (factor) and shift (share of the size) change that.
    """
    center = (frame.min(0) + frame.max(0)) / 2
    plane, _ = view_from_camera(frame, center)
    low = plane.min(0)
    high = plane.max(0)
    width, height = high - low
    scale = zoom * size * min(0.75 / width, 0.92 / height)

    plane, depth = view_from_camera(points, center)
    middle = (low + high) / 2
    shift = np.array(shift) + 0.5
    return (plane - middle) * scale + shift * size, depth


def draw_shadow(canvas, pixels):
    """Darkens the floor where dropped vertices land: counted on a coarse grid, then blurred."""
    grid = 64
    cell = np.clip(pixels * grid / canvas.width, 0, grid - 1).astype(int)     # (V,2)
    column, row = cell.T
    counts = np.bincount(row * grid + column, minlength=grid * grid)
    # saturates: a leg seen from above has few vertices, but its shadow is as dark as the torso's
    darkness = 100 * (1 - np.exp(-counts * 700 / len(pixels)))
    mask = Image.fromarray(darkness.reshape(grid, grid).astype(np.uint8))
    mask = mask.filter(ImageFilter.GaussianBlur(1.3))
    mask = mask.resize(canvas.size, Image.BILINEAR)
    canvas.paste((40, 40, 50), mask=mask)


def vertex_normals(vertices, faces):
    """Unit normals of vertices (V,3): (V,3), outwards; 0 where a vertex has no triangle."""
    corners = vertices[faces]                                                 # (F,3,3)
    edge_1 = corners[:, 1] - corners[:, 0]
    edge_2 = corners[:, 2] - corners[:, 0]
    face_normals = np.cross(edge_1, edge_2)                                   # (F,3)

    # a vertex's normal is the sum over its faces; the cross product weights large ones more
    normals = np.zeros_like(vertices)                                         # (V,3)
    for axis in range(3):
        weights = np.repeat(face_normals[:, axis], 3)
        normals[:, axis] = np.bincount(faces.ravel(), weights, len(vertices))
    return normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12)


def shade(vertices, faces, colors, light):
    """The colours of vertices (V,3) under a lamp in the direction `light`, a unit vector: (V,3)."""
    normals = vertex_normals(vertices, faces)                                 # (V,3)
    brightness = 0.5 + 0.5 * normals @ light               # half Lambert: no side is black
    brightness = 0.30 + 0.80 * brightness ** 1.5                              # (V,)
    return np.asarray(colors) * brightness[:, None]


def render(vertices, faces, colors, size=256, heading=0.0, background=(236, 236, 240), zoom=1.0,
           shift=(0.0, 0.0), floor=True, light=LIGHT):
    """Draws a mesh -> picture (size,size,3) uint8. A painter's algorithm: far triangles first.

    vertices (V,3), metres, y up; faces (F,3); colors (V,3) in 0..1. heading: radians by which the
    person turns about the vertical (0 faces the camera, pi/2 the right edge). background: rgb in
    0..255, or a picture (size,size,3). zoom, shift: see `project`. floor: with a shadow on it.
    light: unit vector to the lamp.
    """
    vertices = np.asarray(vertices, np.float64) @ rotation_y(heading).T
    faces = np.asarray(faces)
    shaded = shade(vertices, faces, colors, light)                            # (V,3)

    # drawn twice as large and averaged at the end, which smooths the edges
    side = 2 * size
    if np.ndim(background) == 1:
        canvas = Image.new("RGB", (side, side), tuple(background))
    else:
        canvas = Image.fromarray(np.asarray(background, np.uint8))
        canvas = canvas.resize((side, side))
    if floor:
        lowest = vertices[:, 1].min()
        dropped = vertices * [1, 0, 1] + [0, lowest, 0]
        draw_shadow(canvas, project(dropped, vertices, side, zoom, shift)[0])

    pixels, depth = project(vertices, vertices, side, zoom, shift)
    draw_triangles(canvas, pixels, depth, faces, shaded)
    return np.asarray(canvas.reduce(2))


def draw_triangles(canvas, pixels, depth, faces, colors):
    """Paints triangles on a PIL picture, the far ones first.

    pixels (V,2) and depth (V,), larger is nearer, of vertices; faces (F,3); colors (V,3) in 0..1.
    """
    # triangles that face the camera: counter-clockwise, but y points down in pixels
    triangles = pixels[faces]                                                 # (F,3,2)
    x_1, y_1 = (triangles[:, 1] - triangles[:, 0]).T       # two edges of each
    x_2, y_2 = (triangles[:, 2] - triangles[:, 0]).T
    visible = np.flatnonzero(x_1 * y_2 - y_1 * x_2 < 0)                       # (f,)
    nearness = depth[faces[visible]].sum(1)
    visible = visible[np.argsort(nearness)]

    rgb = colors[faces[visible]].mean(1).clip(0, 1)                           # (f,3)
    packed = (255 * rgb).astype(int) @ [1, 256, 65536]     # Pillow draws fastest with integers
    polygons = triangles[visible].reshape(-1, 6)
    draw = ImageDraw.Draw(canvas)
    for points, color in zip(polygons.tolist(), packed.tolist()):
        draw.polygon(points, fill=color)


default_body = functools.cache(load_body)                  # read once


def random_color(rng, low, high):
    """A random colour (3,) in 0..1: a grey between low and high, slightly tinted."""
    grey = rng.uniform(low, high)
    tint = rng.uniform(-0.16, 0.16, 3)
    return (grey + tint).clip(0, 1)


def random_outfit(rng):
    """Random clothes for `body_colors`. Hair stays darker than skin: it tells front from back."""
    return {
        "skin": np.array([0.93, 0.76, 0.64]) * rng.uniform(0.65, 1.05),
        "hair": rng.uniform(0.02, 0.14, 3),
        "shirt": random_color(rng, 0.15, 0.9),
        "trousers": random_color(rng, 0.1, 0.75),
        "shoes": random_color(rng, 0.05, 0.35),
    }


def random_background(rng, size):
    """A random background (size,size,3) uint8: plain, a gradient, soft noise, or wall and floor."""
    ramp = np.linspace(0, 1, size)
    x, y = np.meshgrid(ramp, ramp)                                            # (S,S)
    slope = rng.uniform(-1, 1, 2)
    noise = rng.integers(0, 256, (7, 7), dtype=np.uint8)

    kind = ("plain", "gradient", "noise", "wall")[rng.integers(4)]
    if kind == "plain":
        mix = np.zeros((size, size))
    elif kind == "gradient":
        mix = (0.5 + (x - 0.5) * slope[0] + (y - 0.5) * slope[1]).clip(0, 1)
    elif kind == "noise":
        noise = Image.fromarray(noise).resize((size, size), Image.BICUBIC)
        mix = np.asarray(noise) / 255
    else:
        mix = y > 0.68 + 0.15 * slope[0]

    color_1 = random_color(rng, 0.35, 0.95)
    color_2 = random_color(rng, 0.35, 0.95)
    picture = color_1 + mix[..., None] * (color_2 - color_1)
    return (255 * picture).astype(np.uint8)


def random_light(rng):
    """A random direction of the lamp (3,), a unit vector: above, and rather in front."""
    light = rng.normal(size=3) * [1, 0.7, 0.5] + [0, 0.6, 0.8]
    return light / np.linalg.norm(light)


def render_photo(rotmat, size, look, rng, body=None):
    """Photographs one person: rotmat (22,3,3) -> picture (size,size,3) uint8, joints (22,2) pixels.

    look: RNG of the clothes; rng: RNG of light, exposure, background, scale and position. body:
    None for the free one.
    """
    body = body or default_body()
    zoom = rng.uniform(0.75, 1.0)
    light = random_light(rng)
    exposure = rng.uniform(0.75, 1.15)
    shift = rng.uniform(-0.5, 0.5, 2) * (1.0 - 0.92 * zoom)    # who is small may stand off center
    background = random_background(rng, size)
    floor = rng.random() < 0.7

    joints, vertices = body(rotmat[None])
    joints = joints[0].numpy()                                                # (22,3)
    vertices = vertices[0].numpy()                                            # (V,3)
    colors = body_colors(body, 0, **random_outfit(look)) * exposure           # (V,3)
    picture = render(vertices, body.faces, colors.clip(0, 1), size, background=background,
                     zoom=zoom, shift=shift, floor=floor, light=light)
    return picture, project(joints, vertices, size, zoom, shift)[0]


SHIRTS = {                                                 # the colours that questions name
    "red": (0.80, 0.08, 0.08),
    "green": (0.10, 0.55, 0.15),
    "blue": (0.10, 0.22, 0.80),
    "yellow": (0.95, 0.82, 0.10),
    "pink": (0.98, 0.50, 0.70),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.06),
}


def place_side_by_side(vertices, nearness, gaps):
    """Sets people up in the picture's plane, each where the one before ends.

    vertices (n,V,3); nearness (n,): metres towards the camera; gaps (n,): metres behind each.
    Everybody is seen as alone in a photograph: the camera is so far away that it does not matter
    who stands in the middle. -> their vertices (n,V,2), metres, y down; the same dropped to the
    floor (n,V,2); depths (n,V).
    """
    planes = []
    shadows = []
    depths = []
    left = 0.0
    for points, near, gap in zip(vertices, nearness, gaps):                   # (V,3)
        center = (points.min(0) + points.max(0)) / 2
        plane, depth = view_from_camera(points, center)
        dropped = points * [1, 0, 1] + [0, points[:, 1].min(), 0]
        shadow, _ = view_from_camera(dropped, center)

        # the feet of who is nearer are lower in the picture
        move_x = left - plane[:, 0].min()
        move_y = math.sin(PITCH) * near - plane[:, 1].max()
        planes.append(plane + [move_x, move_y])
        shadows.append(shadow + [move_x, move_y])
        depths.append(depth + near)
        left = planes[-1][:, 0].max() + gap
    return np.stack(planes), np.stack(shadows), np.stack(depths)


def render_group(rotmat, size, shirts, looks, rng):
    """Photographs people side by side, from left to right, under one lamp.

    rotmat (n,22,3,3); shirts: n keys of SHIRTS; looks: n RNGs of their other clothes; rng: of
    light, exposure, background, distances and position.
    -> picture (size,size,3) uint8; boxes (n,4) of the people: left, top, width, height in pixels.
    """
    body = default_body()
    light = random_light(rng)
    exposure = rng.uniform(0.85, 1.1)
    background = random_background(rng, size)
    nearness = rng.uniform(-0.3, 0.3, len(rotmat))                            # (n,) metres
    gaps = rng.uniform(0.05, 0.3, len(rotmat))

    _, vertices = body(rotmat)
    vertices = vertices.double().numpy()                                      # (n,V,3)
    colors = []
    for points, shirt, look in zip(vertices, shirts, looks):
        outfit = random_outfit(look) | {"shirt": np.array(SHIRTS[shirt])}
        worn = body_colors(body, 0, **outfit) * exposure                      # (V,3)
        colors.append(shade(points, body.faces, worn.clip(0, 1), light))

    # the group fills nearly all of the width, unless it is tall
    planes, shadows, depths = place_side_by_side(vertices, nearness, gaps)
    low = planes.min((0, 1))                                                  # (2,)
    extent = planes.max((0, 1)) - low
    side = 2 * size                                        # averaged at the end, as in `render`
    scale = rng.uniform(0.9, 1.0) * side * (np.array([0.95, 0.9]) / extent).min()
    corner = rng.uniform(0.2, 0.8, 2) * (side - scale * extent)               # (2,)
    pixels = (planes - low) * scale + corner                                  # (n,V,2)
    shadows = (shadows - low) * scale + corner

    canvas = Image.fromarray(background).resize((side, side))
    for shadow in shadows:
        draw_shadow(canvas, shadow)
    first_vertices = vertices.shape[1] * np.arange(len(vertices))             # (n,)
    faces = np.asarray(body.faces) + first_vertices[:, None, None]            # (n,F,3)
    draw_triangles(canvas, pixels.reshape(-1, 2), depths.ravel(), faces.reshape(-1, 3),
                   np.concatenate(colors))

    top_left = pixels.min(1) / 2                                              # (n,2)
    bottom_right = pixels.max(1) / 2
    boxes = np.concatenate([top_left, bottom_right - top_left], 1)            # (n,4)
    return np.asarray(canvas.reduce(2)), boxes


# What an object can hide: the joints of a limb, or those in one half of the person's outline
LIMB_JOINTS = {
    "arm": ["shoulder", "elbow", "wrist"],
    "leg": ["hip", "knee", "ankle", "foot"],
}
HALVES = {"upper half": [0, -1], "lower half": [0, 1], "left half": [-1, 0], "right half": [1, 0]}
HIDDEN_PARTS = ["left arm", "right arm", "left leg", "right leg", *HALVES]
# Where flesh ends beyond the last joint of a limb: as share of the bone before it
TIPS = {"head": ("neck", 1.2), "left_wrist": ("left_elbow", 0.7), "left_foot": ("left_ankle", 0.5),
        "right_wrist": ("right_elbow", 0.7), "right_foot": ("right_ankle", 0.5)}
FLESH = 0.10                                               # around joints, metres


def pixels_per_metre(joints):
    """The scale of a person, from the joints in a picture (22,2).

    No bone looks longer than it is: the one that looks longest lies in the picture's plane.
    """
    rest = rest_joints().numpy()                                              # (22,3)
    ratios = []
    for joint, parent in enumerate(PARENTS[1:22], 1):
        length = np.linalg.norm(rest[joint] - rest[parent])
        ratios.append(np.linalg.norm(joints[joint] - joints[parent]) / length)
    return max(ratios)


def part_rectangle(joints, part):
    """A rectangle around a part of a person -> its two directions (2,2), low (2,), high (2,).

    joints (22,2), pixels; part: one of HIDDEN_PARTS. low, high: its sides along the directions.
    """
    side, kind = part.split()
    if part in HALVES:
        along = joints @ HALVES[part]                                         # (22,)
        names = [JOINTS[j] for j in np.flatnonzero(along > np.median(along))]
    else:
        names = [f"{side}_{name}" for name in LIMB_JOINTS[kind]]

    points = []
    for name in names:
        joint = joints[JOINTS.index(name)]
        points.append(joint)
        if name in TIPS:
            before, share = TIPS[name]
            points.append(joint + share * (joint - joints[JOINTS.index(before)]))
    points = np.array(points)                                                 # (n,2)

    # along a limb: axes[0] is the direction in which its points spread most
    axes = np.eye(2)
    if part not in HALVES:
        axes = np.linalg.svd(points - points.mean(0), full_matrices=False)[2]
    margin = FLESH * pixels_per_metre(joints)
    low = (points @ axes.T).min(0) - margin
    high = (points @ axes.T).max(0) + margin

    # half a person ends in the middle, without a margin
    if part in HALVES:
        middle = np.median(joints, 0)
        low = np.where(np.array(HALVES[part]) > 0, middle, low)
        high = np.where(np.array(HALVES[part]) < 0, middle, high)
    return axes, low, high


def hide_part(picture, joints, part, rng):
    """Holds a board or a cushion before a part of a person.

    picture (S,S,3) uint8; joints (22,2), pixels; part: one of HIDDEN_PARTS; rng: of the object.
    -> picture (S,S,3) uint8, and which joints the object hides (22,) bool; those of other parts
    that lie behind it are among them.
    """
    axes, low, high = part_rectangle(joints, part)

    # |x|^p + |y|^p = 1 is a circle for p = 2 and a square for large p; it goes round the rectangle
    power = rng.choice([5, 30])                            # a cushion, a board
    half = (high - low) / 2 * 2 ** (1 / power)

    def is_within(places):
        """Which places (...,2) lie in the object's outline."""
        offset = places @ axes.T - (low + high) / 2
        return (np.abs(offset / half) ** power).sum(-1) <= 1

    # drawn twice as large and averaged, as people are
    size = len(picture)
    steps = np.arange(2 * size) / 2 + 0.25
    places = np.stack(np.meshgrid(steps, steps), -1)                          # (2S,2S,2)
    thickness = rng.uniform(0.01, 0.03) * size             # a dark edge, to the right and below
    canvas = Image.fromarray(picture).resize((2 * size, 2 * size), Image.NEAREST)
    texture = random_background(rng, 2 * size)
    edge = Image.fromarray((0.5 * texture).astype(np.uint8))
    canvas.paste(edge, mask=Image.fromarray(is_within(places - thickness)))
    canvas.paste(Image.fromarray(texture), mask=Image.fromarray(is_within(places)))
    hidden = is_within(joints) | is_within(joints - thickness)                # (22,)
    return np.asarray(canvas.reduce(2)), hidden


def cut_photo(picture, joints, rng):
    """Enlarges a part of a photograph, so that the person reaches beyond its edge.

    picture (S,S,3) uint8; joints (22,2), pixels -> the same of the new picture.
    """
    size = len(picture)
    side = size * rng.uniform(0.6, 0.85)
    left, top = rng.uniform(0, size - side, 2)
    box = (left, top, left + side, top + side)
    cut = Image.fromarray(picture).resize((size, size), Image.BILINEAR, box)
    return np.asarray(cut), (joints - [left, top]) * size / side


CELL = 256                                                 # pixels of a cell of a contact sheet
GAP = 6                                                    # between cells
INK = (30, 30, 30)
GREY = (110, 110, 110)


def text_cell(text):
    """A text as a picture (CELL,CELL), cut where it is too long."""
    lines = textwrap.wrap(text or "(no text)", 34)
    if len(lines) > 14:
        lines = [*lines[:13], "…"]
    text = "\n".join(lines)
    cell = Image.new("RGB", (CELL, CELL), "white")
    draw = ImageDraw.Draw(cell)
    draw.multiline_text((10, 8), text, fill=INK, font=ImageFont.load_default(14), spacing=2)
    return cell


def contact_sheet(rows):
    """Rows of cells with their titles -> one PIL picture.

    rows: [(title, [(name, value), ...]), ...]. title: text on the left, its first line larger; ""
    in all rows for none. name: text above a cell. value: a picture (PIL, or (H,W,3) uint8), of
    which the middle square is shown, or a text.
    """
    margin = 0
    header = 0
    n_columns = 0
    for title, cells in rows:
        n_columns = max(n_columns, len(cells))
        if title:
            margin = 170
        if any(name for name, _ in cells):
            header = 24

    width = margin + GAP + n_columns * (CELL + GAP)
    height = header + CELL + GAP                           # of a row
    sheet = Image.new("RGB", (width, height * len(rows) + GAP), (246, 246, 246))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    large_font = ImageFont.load_default(18)

    for row, (title, cells) in enumerate(rows):
        top = GAP + row * height
        headline, _, note = title.partition("\n")
        draw.text((12, top + header + 4), headline, fill="black", font=large_font)
        draw.multiline_text((12, top + header + 32), note, fill=GREY, font=font)

        for column, (name, value) in enumerate(cells):
            left = margin + GAP + column * (CELL + GAP)
            draw.text((left + 2, top + 3), name, fill=GREY, font=font)
            if isinstance(value, str):
                value = text_cell(value)
            elif isinstance(value, np.ndarray):
                value = Image.fromarray(value)
            cell = ImageOps.fit(value, (CELL, CELL))
            sheet.paste(cell, (left, top + header))
    return sheet


def draw_pose(rotmat, body, heading=0.0):
    """Draws a pose (22,3,3) -> picture (CELL,CELL,3) uint8. heading: see `render`."""
    with torch.no_grad():
        _, vertices = body(torch.as_tensor(rotmat)[None])                     # (1,V,3)
    return render(vertices[0].numpy(), body.faces, body_colors(body), CELL, heading)


def save_png(picture, path):
    """Writes a PIL picture as PNG, whole or not at all. Raises UserError."""
    with atomic_write(path) as new:
        picture.save(new, format="PNG")


# ---- 4. What people type -------------------------------------------------------------------------
# A fact is what people say of a pose and joints show. assets/requests.json has them as rows:
#
#   "arm up": {"if": ["relativePosY s_wrist head = 0.12 inf"],
#              "is": ["{the} {side} arm is up", ...], "do": ["raise {the} {side} arm", ...]}
#
#   poses --measure--> values (n,S) --ranges--> which facts hold (n,F) --choose, word--> "Raise ..."
#
# A fact is said of a pose where it holds with a margin. A pose that was made shows a fact where it
# holds at all. `read_facts` reads them back from what is typed, so that an answer can be checked.
METRES = ("distance", "relativePos", "onGround")           # kinds of measures; others are degrees
MARGINS = (0.04, 5.0)                                      # metres, degrees
# of which a mirror changes the sign
SIGNED_KINDS = ("relativePosX", "bodyInclineY", "bodyInclineZ", "relativeRotY", "relativeRotZ")
FACTS_SAID = (1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 8)          # how many, drawn evenly, by requests
                                                           # that leave out what is unusual
SHARE_OF_BASE = 0.75                                       # of requests: say what the body does
SHARE_OF_USUAL = 0.7                                       # of requests: what is not said is usual
SHARE_OF_ALL = 0.6                                         # of instructions: say all that changes
MOST_CHANGES = 6                                           # in one instruction
BOTH_SIDES = tuple(SIDES[1:])
CHUNK = 1000                                               # people whose facts are found at once


class Fact(NamedTuple):
    """What can be said of a pose."""

    name: str               # of its row
    side: str               # "left" | "right" | "both" | ""
    parts: frozenset        # what it is about: {"left_arm"}; "base" is the whole body
    weight: float           # how often it is said, relative to others
    lines: dict             # {"is": [...], "do": [...], "name": [...], "who": [...]}
    activity: str = ""      # of activities.json, if it is only said of people who do that

    def wordings(self, kind, split):
        """Its lines of a kind that a split may say, see `lines_of`."""
        return lines_of(self.lines.get(kind, []), split)


class Change(NamedTuple):
    """How a measure differs between two poses."""

    column: int             # of the measure
    little: float           # a smaller difference is not worth a word
    much: float
    parts: frozenset
    less: list              # commands that make it smaller, {more} in them: how much
    more: list


class Request(NamedTuple):
    """A text, and the numbers of the facts that it says."""

    text: str
    facts: list


def lines_of(lines, split):
    """Those of some lines that a split may say: of four or more the last is for tests only."""
    if len(lines) < 4:
        return lines
    return lines[-1:] if split.startswith("test") else lines[:-1]


def fill_sides(lines, side):
    """Writes a side, and the other one, into lines; {the} stays open."""
    other = {"left": "right", "right": "left"}.get(side, "")
    return [line.replace("{side}", side).replace("{other}", other) for line in lines]


class FactTable:
    """assets/requests.json as arrays: facts, F Facts; changes, C Changes.

    columns: {"lift pelvis neck": its column} of S measures. Terms (T,): column, low and high of
    each range, and the margin within it; starts (F,): the first term of each fact. Of facts:
    weights, is_base, is_unusual (what a whole arm or leg does, if it does not go without
    saying), activity, side (F,). Of changes: changed (C,), their columns, and little (C,).
    """

    def __init__(self):
        book = load_asset("requests")
        self.names = {}                                    # of measures
        for name, measured in book["measures"].items():
            for side in BOTH_SIDES:
                self.names[name_sides(name, side)] = name_sides(measured, side)

        self.columns = {}
        self.facts = []
        self.starts = []
        terms = []
        for group in ("facts", "activities"):
            for name, row in book[group].items():
                activity = name if group == "activities" else ""
                for side in self.sides(row):
                    self.starts.append(len(terms))
                    terms += self.read_terms(row["if"], side)
                    self.facts.append(self.read_fact(name, row, side, activity))
        column, low, high, margin = zip(*terms)
        self.column = np.array(column)                                        # (T,)
        self.low = np.array(low, np.float32)
        self.high = np.array(high, np.float32)
        self.margin = np.array(margin, np.float32)

        self.changes = []
        for row in book["changes"]:
            for side in self.sides(row):
                self.changes.append(self.read_change(row, side))
        self.changed = np.array([change.column for change in self.changes])   # (C,)
        self.little = np.array([change.little for change in self.changes])
        self.weights = np.array([fact.weight for fact in self.facts])         # (F,)
        self.is_base = np.array(["base" in fact.parts for fact in self.facts])
        of_limbs = np.array([bool(fact.parts & {*LIMBS}) for fact in self.facts])
        self.is_unusual = of_limbs & ~self.is_base & (self.weights >= 1)
        self.activity = np.array([fact.activity for fact in self.facts])
        self.side = np.array([fact.side for fact in self.facts])

    def sides(self, row):
        """For which sides a row is written."""
        if not re.search(r"\b[so]_|{(side|other)}", json.dumps(row)):
            return ("",)
        return (*BOTH_SIDES, "both") if "both" in row else BOTH_SIDES

    def column_of(self, measured, side):
        """The column of a measure, by its name or as captions.measure takes it: "angle ..."."""
        measured = name_sides(measured, side or "left")
        measured = self.names.get(measured, measured)
        return self.columns.setdefault(measured, len(self.columns)), measured.split()[0]

    def read_terms(self, texts, side):
        """Ranges, "s_knee bend = 150 inf" -> [(column, low, high, margin), ...]."""
        if side == "both":
            return self.read_terms(texts, "left") + self.read_terms(texts, "right")
        terms = []
        for text in texts:
            measured, bounds = text.split(" = ")
            column, kind = self.column_of(measured, side)
            low, high = map(float, bounds.split())
            if side == "right" and kind in SIGNED_KINDS:
                low, high = -high, -low
            margin = MARGINS[0] if kind.startswith(METRES) else MARGINS[1]
            terms.append((column, low, high, margin))
        return terms

    def read_parts(self, row, side):
        """What a row is about: {"left_arm", "left_elbow"}."""
        sides = BOTH_SIDES if side == "both" else (side or "left",)
        parts = set()
        for one in sides:
            parts.update(name_sides(row["part"], one).split())
        return frozenset(parts)

    def read_fact(self, name, row, side, activity):
        """A row of "facts" or "activities" for one side -> Fact."""
        said = row["both"] if side == "both" else row
        lines = {}
        for kind in ("is", "do", "name", "who"):
            lines[kind] = fill_sides(said.get(kind, []), side)
        row = {"part": "base", "weight": 8 if activity else 1} | row
        return Fact(name, side, self.read_parts(row, side), row["weight"], lines, activity)

    def read_change(self, row, side):
        """A row of "changes" for one side -> Change."""
        column, kind = self.column_of(row["measure"], side)
        less = fill_sides(row["less"], side)
        more = fill_sides(row["more"], side)
        if side == "right" and kind in SIGNED_KINDS:
            less, more = more, less
        little, much = row["by"]
        return Change(column, little, much, self.read_parts(row, side), less, more)

    def values(self, poses):
        """Poses (n,22,3,3) that face +z -> their measures (n,S), metres or degrees."""
        rotmat = poses.detach().float().cpu()
        keypoints = find_keypoints(forward_kinematics(rotmat, rest_joints()))  # (n,35,3)
        by_kind = {}
        for measured, column in self.columns.items():
            kind, *joints = measured.split()
            by_kind.setdefault(kind, []).append((column, keypoint_ids(" ".join(joints))))

        values = np.zeros((len(poses), len(self.columns)), np.float32)        # (n,S)
        for kind, rows in by_kind.items():
            columns = [column for column, _ in rows]
            joint_sets = np.array([joints for _, joints in rows])
            values[:, columns] = measure(kind, joint_sets, keypoints, rotmat.numpy())
        return values

    def holds(self, values, slack=0):
        """Which facts hold for measures (n,S): (n,F) bool.

        slack: by how many margins the ranges are widened: -1 where facts are said, 0 where an
        answer shows them, 1: it would not be wrong to say so.
        """
        low = self.low - slack * self.margin
        high = self.high + slack * self.margin
        holds = []
        for start in range(0, len(values), CHUNK):
            value = values[start:start + CHUNK, self.column]                  # (CHUNK,T)
            is_within = (low <= value) & (value <= high)
            holds.append(np.logical_and.reduceat(is_within, self.starts, axis=1))
        return np.concatenate(holds)

    def choose(self, candidates, n, rng, taken=frozenset()):
        """Up to n of some facts (m,), no two about one part, none about the parts `taken`.

        Facts are given by their numbers.
        """
        # weighted sampling without replacement, see `ActivityTable.edit`
        keys = rng.random(len(candidates)) ** (1 / self.weights[candidates])
        chosen = []
        for k in candidates[np.argsort(-keys)]:
            fact = self.facts[k]
            if len(chosen) < n and not fact.parts & taken:
                taken = taken | fact.parts
                chosen.append(int(k))
        return chosen


fact_table = functools.cache(FactTable)                    # read once


def request_metrics(requests, poses):
    """Requests and the poses (n,22,3,3) that they led to, facing +z -> {metric: value}.

    facts_shown: share of the facts that the requests say which hold for the poses; requests_shown:
    share of the requests of which every fact holds.
    """
    table = fact_table()
    holds = table.holds(table.values(poses))                                  # (n,F)
    shown = [row[request.facts] for row, request in zip(holds, requests)]
    return {
        "facts_shown": float(np.concatenate(shown).mean()),
        "requests_shown": float(np.mean([row.all() for row in shown])),
    }


def without_verb(clause):
    """A clause as a phrase: "{the} left arm is up" -> "{the} left arm up"."""
    return re.sub(r" (is|are) ", " ", clause, count=1)


@functools.cache
def verbs():
    """The first words of all commands."""
    found = set()
    for fact in fact_table().facts:
        found.update(line.split()[0] for line in fact.lines["do"])
    return found - {"be", "do"}


def inflect(command, form):
    """A command with all its verbs in another form: "kneel down and look up" -> "kneeling ...".

    form: changes a verb.
    """
    def change(found):
        before, verb = found.groups()
        is_verb = not before or verb in verbs()
        return before + form(verb) if is_verb else found[0]

    return re.sub(r"(^| and )(\w+)", change, command).strip()


@functools.cache
def gerund(command):
    """A command as a gerund: "sitting down", "not bending {the} knees"; "be upright" -> "upright".
    """
    if command.startswith("do not "):
        return "not " + gerund(command.removeprefix("do not "))

    def form(verb):
        irregular = load_asset("requests")["gerunds"]
        if verb in irregular:
            return irregular[verb]
        return re.sub(r"(?<!e)e$", "", verb) + "ing"

    return inflect(command, form)


@functools.cache
def third_person(command):
    """A command as a statement without its subject: "sits down", "does not bend {the} knees"."""
    def form(verb):
        if verb in ("be", "have"):
            return {"be": "is", "have": "has"}[verb]
        verb = re.sub(r"(?<=[^aeiou])y$", "ie", verb)
        return verb + ("es" if re.search(r"(s|sh|ch|x|[^o]o)$", verb) else "s")

    return inflect(command, form)


FILLERS = {"the", "a", "an", "your", "his", "her", "their", "its"}
NEGATIONS = {"not", "no", "never", "without", "nor", "neither", "stop"}


def bare_words(text):
    """A text, or a line with {the} in it, as its words and commas in lower case, less FILLERS."""
    words = re.findall(r"[\w'-]+|,", text.replace("{the}", "").lower())
    return tuple(word for word in words if word not in FILLERS)


@functools.cache
def phrase_book():
    """How facts are said: {bare words: numbers of the facts that they may mean}.

    "sit down" may be the fact or the activity, "kneel on one knee" either knee. The phrases that
    are for tests only are not in it, or `--decode check` would be tested on what it was given.
    """
    book = {}
    for k, fact in enumerate(fact_table().facts):
        lines = list(fact.wordings("name", "train"))
        for command in fact.wordings("do", "train"):
            lines += [command, gerund(command), third_person(command)]
        for clause in fact.wordings("is", "train"):
            lines += [clause, without_verb(clause)]
        for words in {bare_words(line) for line in lines}:
            book.setdefault(words, []).append(k)

    # "raise the left hand a little" is about the pose before: longer than a fact, it says none
    grammar = load_asset("requests")
    for change in fact_table().changes:
        for line in change.less + change.more:
            for more in grammar["little"] + grammar["much"]:
                if more or "less" in line:
                    book.setdefault(bare_words(line.replace("{more}", more)), [])
    return book


@functools.cache
def longest_phrase():
    """How many words the longest phrase of `phrase_book` has."""
    return max(len(words) for words in phrase_book())


def typed_sentences(text):
    """The sentences of a typed text, in lower case."""
    return re.split(r"[.!?;\n]+", text.lower().replace("’", "'"))


def is_statement(sentence, has_source):
    """Can a sentence be checked as captions are? One about a change needs the pose before."""
    codes = statements(sentence)
    return bool(codes) and (has_source or not codes[0].category.startswith(PAIR))


def read_facts(text, has_source=False):
    """A typed text -> the phrases of the grammar in it, each with the facts that it may mean.

    "Kneel and look up." -> [("kneel", numbers of facts), ("look up", ...)]. At each word the
    longest phrase counts, so that "sit on the floor" is not "sit". A phrase after a negation that
    is not part of it does not count, nor do sentences of captions, which mean ranges of their own.
    has_source: the text changes a pose, so that sentences of difference texts do not count either.
    """
    found = []
    for sentence in typed_sentences(text):
        if not is_statement(sentence, has_source):
            found += read_phrases(bare_words(sentence))
    return found


def read_phrases(words):
    """The bare words of a sentence -> what `read_facts` finds in it."""
    book = phrase_book()
    found = []
    start = 0
    while start < len(words):
        end = min(start + longest_phrase(), len(words))
        while end > start and words[start:end] not in book:
            end -= 1
        phrase = words[start:end]

        earlier, before = ("", "", *words[:start])[-2:]
        is_negated = before in NEGATIONS or before.endswith("n't")
        if phrase and book[phrase] and not is_negated and not may_be_noun(words, start, end):
            found.append((" ".join(phrase), book[phrase]))

        # "throwing a ball" may mean either arm, but not before "with the left arm"
        elif found and words[start] in BOTH_SIDES and before == "with" and earlier not in NEGATIONS:
            said, facts = found[-1]
            sided = [k for k in facts if fact_table().facts[k].side == words[start]]
            found[-1] = (said, sided or facts)
        start = max(end, start + 1)
    return found


def may_be_noun(words, start, end):
    """May a phrase be a thing, and not what somebody does? "a box", "a bridge", "read off"

    One word is what somebody does if it is a gerund, or a sentence begins with it and goes on with
    something else: "Kneel with one arm up."
    """
    if end - start > 1 or words[start].endswith("ing"):
        return False
    follows = [*words[end:], ""][0]
    return start > 0 or follows not in ("", ",", "and", "with")


def share_shown(text, poses, source=None):
    """Which share of what a text says is seen in each of M poses (M,22,3,3) that face +z -> (M,).

    What it says are the statements of captions and difference texts, see `share_true`, and the
    facts that `read_facts` finds in other sentences. Without either all shares are 0.
    source: the pose (22,3,3) that the text changes, or None.
    """
    has_source = source is not None
    said = read_facts(text, has_source)
    stated = [line for line in typed_sentences(text) if is_statement(line, has_source)]
    stated = ". ".join(stated)
    if not said:
        return share_true(stated, poses, source)

    table = fact_table()
    holds = table.holds(table.values(poses))                                  # (M,F)
    n_stated = len(statements(stated))
    n_shown = n_stated * share_true(stated, poses, source)                    # (M,)
    for _, facts in said:
        n_shown += holds[:, facts].any(1)
    return n_shown / (n_stated + len(said))


def unseen_phrases(text, pose):
    """The phrases that `read_facts` finds in a text and that a pose (22,3,3) clearly lacks."""
    table = fact_table()
    [holds] = table.holds(table.values(pose[None]), slack=1)                  # (F,)
    said = read_facts(text, has_source=True)               # of a change there is nothing to see
    unseen = [phrase for phrase, facts in said if not holds[facts].any()]
    return list(dict.fromkeys(unseen))


class Writer:
    """Puts the facts of one request into words.

    rng: np.random.Generator; split: whose phrases are used, see `lines_of`. Parts of the body are
    "the", "your" or "his" in all of the text.
    """

    def __init__(self, rng, split):
        self.rng = rng
        self.split = split
        self.book = load_asset("requests")

    def pick(self, choices):
        """One of a list, all equally likely. Faster than rng.choice."""
        return choices[int(self.rng.random() * len(choices))]

    def line(self, fact, kind):
        """A line of a Fact of a kind, "" if it has none.

        Most people who say no side mean the right one. So the left one is said wherever there is a
        line for it, or a model would answer "a kick" by the mean of both legs.
        """
        lines = fact.wordings(kind, self.split)
        if fact.side == "left":
            sided = [line for line in lines if re.search("left|right", line)]
            lines = sided if sided or kind == "name" else lines
        return self.pick(lines) if lines else ""

    def request(self, facts):
        """Facts -> a text. The one about the whole body, if any, comes first."""
        base = [fact for fact in facts if "base" in fact.parts]
        others = [fact for fact in facts if "base" not in fact.parts]
        form = self.rng.random()
        if form < 0.3:
            return self.commands(base + others)
        if not base:
            return self.portrait(others)
        if form < 0.4:
            return self.fragments(base[0], others)
        return self.scene(base[0], others)

    def commands(self, facts):
        """ "Kneel on one knee, raise your left arm and look up." """
        lines = [self.line(fact, "do") for fact in facts]
        return self.finish(self.join(lines), self.pick(["the", "your", "your"]))

    def fragments(self, base, others):
        """ "kneeling, left arm up, head down" """
        phrases = [gerund(self.line(base, "do"))]
        phrases += [without_verb(self.line(fact, "is")) for fact in others]
        return self.finish(self.join(phrases), "")

    def portrait(self, facts):
        """ "a man with his left arm up", "left arm up, head down": nothing of the whole body. """
        who, whose = self.person(facts)
        clauses = [self.line(fact, "is") for fact in facts]
        phrases = [without_verb(clause) for clause in clauses]
        form = self.pick(["with", "doing", "phrases", "clauses"])
        if form == "phrases":
            return self.finish(self.join(phrases), "")

        if form == "with":
            text = f"{who} with {join_words(phrases)}"
        elif form == "doing":
            doing = [gerund(self.line(fact, "do")) for fact in facts]
            text = who + self.pick([" ", " is ", " who is "]) + join_words(doing)
        else:
            text = self.join(clauses)
            whose = self.pick(["your", whose])
        return self.finish(text, self.pick(["the", whose]))

    def scene(self, base, others):
        """ "A man is kneeling on one knee with his left arm up." """
        who, whose = self.person([base])
        do = self.line(base, "do")
        name = self.line(base, "name")
        opening = self.pick(self.book["openings"])
        doing = gerund(do)
        heads = 2 * [f"{opening}{who} {doing}"]
        heads += [f"{who} is {doing}", f"{who} {third_person(do)}", doing]
        if name:
            heads += 3 * [opening + name]
        if name.endswith(("pose", "position", "stance")):
            heads.append(f"{opening}{who} in {name}")
        text = self.pick(heads) + self.tail(others, whose)
        return self.finish(text, self.pick(["the", whose]))

    def tail(self, others, whose):
        """What follows the first words of a scene: " with his left arm up and his head down"."""
        if not others:
            return ""
        clauses = [self.line(fact, "is") for fact in others]
        commands = [self.line(fact, "do") for fact in others]
        form = self.pick(["with", "with", "with", "doing", "clauses", "does"])
        if form == "with":
            phrases = [without_verb(clause) for clause in clauses]
            return self.pick([" with ", ", with ", ", "]) + join_words(phrases)
        if form == "doing":
            doing = [gerund(command) for command in commands]
            return self.pick([" and ", ", "]) + join_words(doing)
        if form == "clauses":
            return ". " + self.join(clauses)
        pronoun = {"his": "he", "her": "she"}.get(whose, "it")
        does = [third_person(command) for command in commands]
        return f". {pronoun} {join_words(does)}"

    def instruction(self, facts, changes):
        """Facts that a pose should show, and Changes to make -> "Raise your left arm. Look up."

        changes: [(Change, by how much), ...].
        """
        lines = [self.demand(fact) for fact in facts]
        for change, size in changes:
            line = self.pick(change.less if size < 0 else change.more)
            how_much = "much" if abs(size) > change.much else "little"
            line = line.replace("{more}", self.pick(self.book[how_much]))
            lines.append(line.strip())
        text = self.pick(self.book["before"]) + self.join(lines)
        return self.finish(text, self.pick(["the", "your", "your"]))

    def demand(self, fact):
        """A fact that a pose should show: "raise {the} left arm", "{the} left arm should be up"."""
        clause = self.line(fact, "is")
        if not clause or self.rng.random() < 0.8:
            return self.line(fact, "do")
        verb = self.pick([" should be ", " must be ", " "])
        return re.sub(r" (is|are) ", verb, clause, count=1)

    def person(self, facts):
        """Somebody, and the possessive: ("a man", "his"). Some facts have people of their own."""
        who = self.line(facts[0], "who")
        if who and self.rng.random() < 0.5:
            return who, self.pick(["his", "her", "their"])
        who = self.pick([*self.book["people"]])
        return who, self.book["people"][who]

    def join(self, lines):
        """Joins lines by commas, full stops or "and"; after commas the last one may follow "and".
        """
        mark = self.pick([", ", ". ", " and "])
        if mark == ", " and self.rng.random() < 0.5:
            return join_words(lines)
        return mark.join(lines)

    def finish(self, text, the):
        """Fills in {the}; half of the texts begin with a capital and end with a full stop."""
        text = " ".join(text.replace("{the}", the).split())
        return tidy_sentence(text + ".") if self.rng.random() < 0.5 else text


# ---- 5. World and Mixture ------------------------------------------------------------------------
PICTURES_KEPT = 2048                                       # by a World; 100 MB at 128 pixels
PLACES = {                                                 # of n people, from left to right
    2: ["left", "right"],
    3: ["left", "middle", "right"],
    4: ["left", "second from the left", "second from the right", "right"],
}
POOL = 64                                                  # rows that have the people of a group
POOL_STEP = 4                                              # the pool of the next group starts later


# The methods of World that write the texts of training prompts, drawn evenly
PROMPTS = [*4 * ["caption"], "short_caption", *4 * ["request"], "speculation"]
SHARE_OF_INSTRUCTIONS = 0.5                                # of edits; the others are differences


class Group(NamedTuple):
    """Some people side by side, from left to right."""

    number: int
    people: list            # their rows of the world, even: their activities are known
    shirts: list            # the colours of their shirts, all different

    @property
    def places(self):
        """Where each of them is, as the viewer sees it."""
        return PLACES[len(self.people)]


# Of the photographs to learn from: those of which an object hides a part, or the edge cuts one off
SHARE_OF_HIDDEN = 0.15
SHARE_OF_CUT = 0.10

NOBODY = "Nobody in the picture fits."                     # the answer where this is so
SHARE_OF_WHO = 0.5                                         # of those for texts: only who it is
SHARE_OF_TWO = 0.4                                         # of questions: that name two features


class Feature(NamedTuple):
    """Something that a question may say of a person."""

    words: str              # behind "the one": "in the red shirt", "who waves"
    fits: list              # of which people of the group it is true
    whoever: str = ""       # behind "whoever": "waves"


def introduce(shirt, place):
    """Who of several people is meant: "In red, on the left."."""
    return f"In {shirt}, {load_asset('questions')['places'][place][0]}."


def drop_introduction(text):
    """A text about one of several people, without what `introduce` says."""
    return re.sub(r"^in [^.]*\.\s*", "", text, flags=re.IGNORECASE)


class Question(NamedTuple):
    """A question about one person of a group."""

    text: str               # "Estimate the pose of the one in the red shirt."
    person: int             # the person's place from the left, from 0; -1: nobody fits

N_HELD_OUT = 2                                             # wordings of an activity, for tests


def ask_about(features, target, rng):
    """A question for the person with some Features, in words. target: see `World.question`."""
    grammar = load_asset("questions")
    first, *others = features
    who = f"{rng.choice(grammar['heads'])} {first.words}"
    if first.whoever and rng.random() < 0.5:
        who = f"whoever {first.whoever}"
    who = " ".join([who, *[feature.words for feature in others]])
    return rng.choice(grammar[target]).format(who=who)


def speculations(activity, split):
    """The requests that imply the pose of an activity and name neither: a list.

    Their last N_HELD_OUT are those of the splits for tests, the others of all other splits.
    """
    wordings = load_asset("speculative")["activities"][activity]
    if split.startswith("test"):
        return wordings[-N_HELD_OUT:]
    return wordings[:-N_HELD_OUT]


class World:
    """The embedded data set: the first n people of a split, and what can be said and shown of them.

    poses (n,22,3,3) facing +z; camera_poses (n,22,3,3), the same turned as photographs show them;
    headings (n,) radians; activity: n names, "" for people of none; side: on which side of the body
    it is, "left" | "right" | "", as `about` of activities.json says; size: pixels of a photograph.
    Rows 2i and 2i+1 are a pair. Row i depends on (split, i) only, never on n. Raises UserError.
    """

    def __init__(self, split="train", n=2000, size=128):
        self.split = split
        self.size = size
        people = sample_people(split, n)
        self.poses = people.poses
        self.headings = people.headings
        self.side = people.sides
        self.angles = people.angles[0::2]                  # (n/2,C) of those who are no edits
        names = [*activity_table().activities, ""]         # the last is that of NONE
        self.activity = [names[a] for a in people.activity]
        turns = np.stack([rotation_y(heading) for heading in self.headings])  # (n,3,3)
        self.camera_poses = turn_root(self.poses, torch.tensor(turns))
        self.pictures = {}                                 # what `image` has drawn

    def photo(self, i):
        """The photograph of person i (size,size,3) uint8, and its joints (22,2) in pixels.

        In the splits for tests the whole person is seen, in the others a part is missing at times.
        """
        row = SPLITS[self.split] + int(i)
        look = np.random.default_rng((row // 2, 1))        # a pair wears the same clothes
        rng = np.random.default_rng((row, 2))
        picture, joints = render_photo(self.camera_poses[i], self.size, look, rng)
        if self.split.startswith("test"):
            return picture, joints

        rng = np.random.default_rng((row, 6))
        chance = rng.random()
        if chance < SHARE_OF_HIDDEN:
            picture, _ = hide_part(picture, joints, rng.choice(HIDDEN_PARTS), rng)
        elif chance < SHARE_OF_HIDDEN + SHARE_OF_CUT:
            picture, joints = cut_photo(picture, joints, rng)
        return picture, joints

    def image(self, i):
        """The photograph of person i, without the joints; the first PICTURES_KEPT are drawn once.
        """
        i = int(i)
        if i in self.pictures:
            return self.pictures[i]
        picture, _ = self.photo(i)
        if len(self.pictures) < PICTURES_KEPT:
            self.pictures[i] = picture
        return picture

    def hidden_photo(self, i, part):
        """The photograph of person i with an object before a part, and which joints it hides.

        part: one of HIDDEN_PARTS. -> picture (size,size,3) uint8, hidden (22,) bool.
        """
        row = SPLITS[self.split] + int(i)
        number = HIDDEN_PARTS.index(part)
        picture, joints = self.photo(i)
        return hide_part(picture, joints, part, np.random.default_rng((row, 3, number)))

    @property
    def n_groups(self):
        """How many groups the people of this world make."""
        return max(0, (len(self.poses) - POOL) // POOL_STEP + 1)

    def group(self, k, n):
        """Group k of n people, 2 to 4: it depends on (split, k, n) only. Raises UserError."""
        if n not in PLACES or not 0 <= k < self.n_groups:
            raise UserError(f"there is no group {k} of {n} people: a group has 2 to 4, and the "
                            f"{len(self.poses)} people of this world make {self.n_groups} groups")
        rng = np.random.default_rng((SPLITS[self.split] + k, 4, n))
        people = k * POOL_STEP + 2 * rng.choice(POOL // 2, n, replace=False)
        shirts = rng.choice(list(SHIRTS), n, replace=False)
        return Group(k, people.tolist(), shirts.tolist())

    def group_photo(self, group):
        """The photograph of a group (size,size,3) uint8, and boxes (n,4) of its people.

        Their poses are this world's `camera_poses`. Boxes: left, top, width, height in pixels.
        """
        rng = np.random.default_rng((SPLITS[self.split] + group.number, 5, len(group.people)))
        looks = []
        for i in group.people:
            looks.append(np.random.default_rng(((SPLITS[self.split] + i) // 2, 1)))
        poses = self.camera_poses[group.people]                               # (n,22,3,3)
        return render_group(poses, self.size, group.shirts, looks, rng)

    def is_named(self, i):
        """Is the activity of person i known? Edits may have left it, and some people have none."""
        return i % 2 == 0 and self.activity[i] != ""

    def fits_bare_name(self, i):
        """Is its name alone enough to know what person i does? Without a side it means the right.
        """
        return self.is_named(i) and self.side[i] != "left"

    @functools.cached_property
    def named(self):
        """The people whose activity is known."""
        return [i for i in range(len(self.poses)) if self.is_named(i)]

    @functools.cached_property
    def implied(self):
        """The people whose activity a text can imply that names no side."""
        return [i for i in self.named if self.fits_bare_name(i)]

    def clothes_feature(self, group, shirt, rng):
        """A shirt as a Feature."""
        pattern = rng.choice(load_asset("questions")["clothes"])
        fits = [worn == shirt for worn in group.shirts]
        return Feature(pattern.format(shirt=shirt), fits)

    def place_feature(self, group, place, rng):
        """A place as a Feature: left is the viewer's left."""
        words = rng.choice(load_asset("questions")["places"][place])
        return Feature(str(words), [taken == place for taken in group.places])

    def activity_feature(self, group, i):
        """What person i does, as a Feature that fits all who look alike. None: no activity."""
        activity = self.activity[i]
        if not activity:
            return None
        doing, does, parts = load_asset("questions")["activities"][activity]
        fits = []
        for other in group.people:
            fits.append(activity_table().looks_like(activity, parts, self.angles[other // 2]))
        return Feature(doing, fits, does)

    def statement_feature(self, group, i, rng):
        """A statement about the pose of person i as a Feature: "whose left knee is bent".

        It fits all of whom it is true within the tolerance. None if it cannot be said like this.
        """
        chosen = choose_codes(eligible_codes(pose_table(), self.codes, i), rng)
        code = chosen[rng.integers(len(chosen))]
        sentence = to_text([code], rng)
        if not sentence.startswith("The ") or sentence.startswith("The person "):
            return None
        fits = [is_true(code, self.codes, other)[0] for other in group.people]
        return Feature("whose " + sentence.removeprefix("The ").rstrip("."), fits)

    def feature(self, group, kind, rng, person=None):
        """A Feature of a kind, "activity" | "clothes" | "place" | "statement", or None.

        person: of this person of the group. None: of any, or of somebody who is not there.
        """
        if person is None and rng.random() < 0.5:
            person = int(rng.integers(len(group.people)))
        if person is None:
            shirt = rng.choice(list(SHIRTS))
            place = rng.choice(list(load_asset("questions")["places"]))
            i = group.number * POOL_STEP + 2 * int(rng.integers(POOL // 2))
        else:
            shirt = group.shirts[person]
            place = group.places[person]
            i = group.people[person]

        if kind == "clothes":
            return self.clothes_feature(group, shirt, rng)
        if kind == "place":
            return self.place_feature(group, place, rng)
        if kind == "activity":
            return self.activity_feature(group, i)
        return self.statement_feature(group, i, rng)

    def question(self, group, rng, target="pose", absent=False):
        """A Question about a group that has one answer. rng: of what it asks, and how.

        It says a person's clothes, place, activity, a statement about the pose, or two of these.
        What it says is true of one person and, as far as can be measured, of nobody else.
        target: what it asks for, "pose" | "text" | "who". absent: nobody fits.
        """
        kinds = ["activity", "clothes", "place", "statement"]
        while True:
            person = None if absent else int(rng.integers(len(group.people)))
            n_kinds = 2 if rng.random() < SHARE_OF_TWO else 1
            chosen = sorted(rng.choice(kinds, n_kinds, replace=False))
            features = [self.feature(group, kind, rng, person) for kind in chosen]
            if None in features:
                continue

            fits = np.all([feature.fits for feature in features], 0)          # (n,)
            if fits.sum() == (0 if absent else 1):
                text = ask_about(features, target, rng)
                return Question(text, -1 if absent else person)

    @functools.cached_property
    def codes(self):
        """The posecodes of all people, computed for the first caption."""
        return posecodes(self.poses)

    @functools.cached_property
    def pairs(self):
        """The paircodes of all pairs: from even to odd rows, and back."""
        even = self.poses[0::2]
        odd = self.poses[1::2]
        return paircodes(even, odd), paircodes(odd, even)

    @functools.cached_property
    def views(self):
        """The side that each person turns to the camera, one of VIEWS; "" if not upright."""
        joints = forward_kinematics(self.poses, rest_joints())                # (n,22,3)
        necks = joints[:, JOINTS.index("neck")]                               # (n,3)
        necks = F.normalize(necks, dim=-1)
        quarters = np.round(self.headings / (math.pi / 2)).astype(int) % 4

        views = []
        for neck, quarter in zip(necks, quarters):
            is_upright = neck[1] > 0.7                     # less than 45 degrees off
            views.append(VIEWS[quarter] if is_upright else "")
        return views

    def coarse_caption(self, i):
        """Activity and side of a photograph: "tree pose, seen from the left"."""
        text = self.activity[i] or "a pose"
        if self.views[i]:
            text += ", " + add_view(self.views[i])
        return text.lower().rstrip(".")

    def caption(self, i, rng):
        """The pose of person i in words; rng chooses statements and wording."""
        return caption(self.codes, i, rng)

    def image_caption(self, i, rng):
        """The caption of the photograph: starts with the viewing side, if it is defined."""
        return add_view(self.views[i], self.caption(i, rng))

    def user_prompt(self, i, rng):
        """What people type to get the pose of person i: a caption, whole or short, a request, or
        something that only implies the pose."""
        kind = PROMPTS[rng.integers(len(PROMPTS))]
        if kind == "speculation" and not self.fits_bare_name(i):
            kind = "request"
        return getattr(self, kind)(i, rng)

    def short_caption(self, i, rng):
        """The activity of person i, if known, and some of the statements of its caption."""
        share = rng.choice([0.0, 0.1, 0.3, 0.5])
        codes = choose_codes(eligible_codes(pose_table(), self.codes, i), rng)
        codes = [code for code in codes if rng.random() < share]

        sentences = []
        if self.fits_bare_name(i) and rng.random() < 0.7:
            activity = self.activity[i]
            sentences.append(f"{activity[0].upper()}{activity[1:]}.")
        if codes:
            sentences.append(to_text(codes, rng))
        return " ".join(sentences) or self.caption(i, rng)

    @functools.cached_property
    def measures(self):
        """What facts measure (n,S), metres or degrees."""
        return fact_table().values(self.poses)

    @functools.cached_property
    def facts(self):
        """The facts that may be said of each person (n,F) bool.

        Of an edit no activity is said: it may have left it.
        """
        table = fact_table()
        sides = np.array(self.side)[:, None]
        activities = np.array(self.activity)[:, None]
        activities[1::2] = "an edit"
        is_side = (table.side == sides) | (table.side == "")
        is_doing = (table.activity == activities) & is_side
        return table.holds(self.measures, slack=-1) & (is_doing | (table.activity == ""))

    @functools.cached_property
    def stands(self):
        """Who stands: a request need not say so (n,) bool."""
        standing = [fact.name == "standing" and not fact.activity for fact in fact_table().facts]
        return self.facts[:, standing.index(True)]

    @functools.cached_property
    def possible_facts(self):
        """The facts that are not clearly false of each person (n,F) bool, activities aside."""
        return fact_table().holds(self.measures, slack=1)

    def ask(self, i, rng):
        """A Request for the pose of person i in words of the grammar, all of it true.

        Who asks for a raised hand means the other one to hang (Grice's maxim of quantity). So most
        requests say all that whole arms and legs do, unless it is usual or follows from what the
        body does; the others say some facts, whatever they leave out.
        """
        table = fact_table()
        may_say = self.facts[i]                                               # (F,)
        n = FACTS_SAID[rng.integers(len(FACTS_SAID))]
        says_unusual = rng.random() < SHARE_OF_USUAL
        facts = []
        says_base = rng.random() < SHARE_OF_BASE
        if says_base or (says_unusual and not self.stands[i]):
            facts = table.choose(np.flatnonzero(may_say & table.is_base), 1, rng)
        taken = table.facts[facts[0]].parts if facts else set()

        unusual = np.flatnonzero(may_say & table.is_unusual)
        if says_unusual and len(unusual):
            facts += table.choose(unusual, len(unusual), rng, taken)
        elif not (says_unusual and facts):
            others = np.flatnonzero(may_say & ~table.is_base)
            facts += table.choose(others, n - len(facts), rng, taken)
        if not facts:
            return Request(self.caption(i, rng), [])
        text = Writer(rng, self.split).request([table.facts[k] for k in facts])
        return Request(text, facts)

    def request(self, i, rng):
        """What people type to get the pose of person i."""
        return self.ask(i, rng).text

    def speculation(self, i, rng):
        """A request for what person i does that never names it: "You just dropped your keys."

        The caption, where the activity is not known.
        """
        if not self.is_named(i):
            return self.caption(i, rng)
        wordings = speculations(self.activity[i], self.split)
        return wordings[rng.integers(len(wordings))]

    def difference(self, i, rng):
        """How to get from person i to its partner, in words."""
        return difference(self.pairs[i % 2], i // 2, rng)

    def edit_prompt(self, i, rng):
        """The same as people type it: a difference text, or an instruction."""
        if rng.random() < SHARE_OF_INSTRUCTIONS:
            return self.instruction(i, rng)
        return self.difference(i, rng)

    def instruction(self, i, rng):
        """How to get from person i to its partner in words of the grammar: "Raise your left arm."

        It says facts that begin to hold and changes of measures, all of them or some.
        """
        table = fact_table()
        begins = self.facts[i ^ 1] & ~self.possible_facts[i]                  # (F,)
        difference = (self.measures[i ^ 1] - self.measures[i])[table.changed]
        n = MOST_CHANGES
        if rng.random() > SHARE_OF_ALL:
            n = 1 + int(rng.integers(3))

        facts = table.choose(np.flatnonzero(begins), n, rng)
        facts = [table.facts[k] for k in facts]
        taken = frozenset().union(*[fact.parts for fact in facts])
        changes = []
        for k in rng.permutation(np.flatnonzero(np.abs(difference) > table.little)):
            change = table.changes[k]
            if len(facts) + len(changes) < n and not change.parts & taken:
                taken |= change.parts
                changes.append((change, float(difference[k])))
        if not facts and not changes:
            return self.difference(i, rng)
        return Writer(rng, self.split).instruction(facts, changes)

    def group_of(self, i):
        """The group that a question about person i is about: of 2, 3 or 4 people in turn."""
        number, extra = divmod(i // 2, 3)
        return self.group(number % max(1, self.n_groups), 2 + extra)

    def group_image(self, i):
        """The photograph of that group (size,size,3) uint8."""
        return self.group_photo(self.group_of(i))[0]

    def subjects(self, task, i, same=False):
        """The people that a task is about: (i,), or i and its partner. same: i and itself."""
        if not TASKS[task].pair:
            return (i,)
        return (i, i) if same else (i, i ^ 1)

    def text(self, task, i, rng, training=False, same=False):
        """The text of a task about person i, or about the way from i to its partner.

        training, same: see `example`.
        """
        row = TASKS[task]
        method = row.text
        if training and row.typed:
            method = row.typed
        if training and row.target == "text":
            rng = None                                     # one fixed wording
        if same and row.pair:
            return to_text([], rng, demand=True)           # that nothing changes
        return getattr(self, method)(i, rng)

    def history(self, task, i, rng, reads_poses=True):
        """The turns before a turn of a conversation about person i: a list of (task, person).

        The first makes, describes or estimates a pose, and further ones edit and compare, so that
        there are two to four turns in all. reads_poses: whether a pose can be shown to the model.
        """
        openings = ["text2pose", "image2pose"]
        if reads_poses:
            openings.append("pose2text")
        start = i
        later = []
        if task == "chat_compare":
            later = [("chat_edit", i)]
        elif rng.random() < 0.5:
            # an edit leads to person i
            start = i ^ 1
            later = [("chat_edit", start)]
            if rng.random() < 0.5:
                later.append(("chat_compare", start))
        return [(str(rng.choice(openings)), start), *later]

    def group_example(self, i, rng, target, training=False, cache=None, absent=False):
        """A question about one of the people of a group, their picture, and the answer.

        target: what is asked for. "pose": in the camera's frame; "text": who is meant and a
        description; "who": who is meant alone. absent: nobody fits, which is the answer then.
        training, cache: see `example`.
        """
        source = cache or self
        group = self.group_of(i)
        text, person = self.question(group, rng, target, absent)
        answer = NOBODY
        if not absent and target == "pose":
            answer = source.camera_poses[group.people[person]]
        elif not absent:
            answer = introduce(group.shirts[person], group.places[person])
            if target == "text":
                caption = self.image_caption(group.people[person], None if training else rng)
                answer = f"{answer} {caption}"
        return [text, source.group_image(i), answer]

    def example(self, task, i, rng, training=False, cache=None, same=False):
        """The inputs of a task about person i, in order, then its target.

        rng: of the wording of texts. training: prompts vary as people type them; targets have one
        fixed wording, because the input does not tell which one was drawn. cache: replaces this
        world's `poses`, `camera_poses` and `image`, for example by codes and image features.
        same: a pair task is about person i and itself, who do not differ, and a question about a
        group is about nobody in it.
        """
        if TASKS[task].group:
            target = TASKS[task].target
            if training and target == "text" and rng.random() < SHARE_OF_WHO:
                target = "who"                             # a long text teaches little about it
            return self.group_example(i, rng, target, training, cache, absent=same)
        source = cache or self
        subjects = self.subjects(task, i, same)

        def value_of(kind, which):
            person = subjects[which]
            if kind == "text":
                return self.text(task, i, rng, training, same)
            if kind == "image":
                return source.image(person)
            if TASKS[task].frame == "camera":
                return source.camera_poses[person]
            return source.poses[person]

        return task_values(task, value_of)


SHARE_OF_SAME = 0.06                                       # of pair tasks: a person and itself
SHARE_OF_ABSENT = 0.1                                      # of questions about a group: nobody fits
SHARE_OF_BARE = {"text2pose": 0.1, "chat_edit": 0.5}       # of texts: no instruction around them


class Mixture:
    """Training examples of some tasks without end: mixture[k] -> (task, segments).

    Example k depends on (seed, k) only. In 6 % of the pair tasks a person is compared with itself,
    or a model would find differences everywhere, and 10 % of the questions about a group fit
    nobody. 10 % of the texts that ask for a pose and half of the edits in a conversation stand
    alone, without an instruction. A turn of a conversation comes after earlier turns: segments of
    the kind "turn", whose values are segments. cache: see `World.example`. templates: how many of
    the instructions are used (1: the plain one). photos: how many of the people image tasks are
    about (0: all). reads_poses: see `World.history`. n_who: so many examples in front ask who of a
    group is meant, and no more.
    """

    def __init__(self, tasks, seed, world, cache=None, templates=N_TEMPLATES, photos=0,
                 reads_poses=True, n_who=0):
        self.tasks = list(tasks)
        self.seed = seed
        self.world = world
        self.cache = cache
        self.templates = templates
        self.photos = photos or len(world.poses)
        self.reads_poses = reads_poses
        self.n_who = n_who

    def __getitem__(self, k):
        if k < self.n_who:
            return "reason_text", self.who(k)

        rng = np.random.default_rng((self.seed, k))
        task = self.tasks[rng.integers(len(self.tasks))]
        row = TASKS[task]
        n_people = len(self.world.poses)
        if "image" in row.inputs or row.turn:
            n_people = self.photos
        i = int(rng.integers(n_people))
        if task == "speculate" and self.world.implied:
            i = self.world.implied[i % len(self.world.implied)]

        share = SHARE_OF_ABSENT if row.group else SHARE_OF_SAME
        same = np.random.default_rng((self.seed, k, 1)).random() < share
        if not row.turn:
            return task, self.segments(task, i, rng, same)

        segments = []
        for past, person in self.world.history(task, i, rng, self.reads_poses):
            segments.append(("turn", self.segments(past, person, rng, is_past=True), False))
        return task, [*segments, *self.segments(task, i, rng)]

    def template(self, task, rng):
        """One of the instructions of a task that are used."""
        choices = templates(task)[:self.templates]
        return choices[rng.integers(len(choices))]

    def who(self, k):
        """Example k of those that only ask who of a group is meant: a list of segments."""
        rng = np.random.default_rng((self.seed, k))
        i = int(rng.integers(self.photos))
        absent = rng.random() < SHARE_OF_ABSENT
        template = self.template("reason_text", rng)
        values = self.world.group_example(i, rng, "who", True, self.cache, absent)
        return render_template("reason_text", values, template)

    def segments(self, task, i, rng, same=False, is_past=False):
        """An example of a task about person i in one of the instructions: a list of segments.

        is_past: a later turn is about its answer, so a pose faces front whatever the task says.
        """
        template = self.template(task, rng)
        share = SHARE_OF_BARE.get(task, 0)
        if share and self.templates > 1 and rng.random() < share:
            template = "<caption>"                         # as in a conversation: "Kneel."
        values = self.world.example(task, i, rng, training=True, cache=self.cache, same=same)
        if is_past and TASKS[task].frame == "camera":
            values[-1] = (self.cache or self.world).poses[i]
        return render_template(task, values, template)


def words_in(grammar):
    """All sentences and phrases of a grammar in assets/: the strings in its lists and dicts."""
    if isinstance(grammar, str):
        return [re.sub(r"{\w+}|_", " ", grammar)]
    if isinstance(grammar, dict):
        grammar = [*grammar, *[value for key, value in grammar.items() if key != "about"]]
    return [line for part in grammar for line in words_in(part)]


def request_words():
    """All that `Writer` can say, in pieces."""
    book = load_asset("requests")
    lines = ["his her its their he she it your who is doing in with and should must be"]
    for fact in fact_table().facts:
        lines += fact.lines["is"] + fact.lines["name"] + fact.lines["who"]
        for command in fact.lines["do"]:
            lines += [command, gerund(command), third_person(command)]
    for change in fact_table().changes:
        lines += change.less + change.more
    for words in ("people", "openings", "little", "much", "before"):
        lines += [*book[words]]
    return [re.sub(r"{\w+}", "", line) for line in lines]


def vocabulary(texts=()):
    """All words and punctuation marks of templates, captions and `texts`: sorted, lower case."""
    lines = [*activity_table().activities, *texts]
    lines += [add_view(view) for view in VIEWS]
    lines += [NOBODY, "whose", "whoever", *SHIRTS]
    lines += [*words_in(load_asset("questions")), *words_in(load_asset("speculative"))]
    lines += request_words()
    for task in TASKS:
        lines += [SLOT.sub(" ", line) for line in templates(task)]
    words = re.findall(r"[^\s.,?]+|[.,?]", " ".join(lines).lower())
    return sorted({*words, *caption_words()})


# ---- 6. Pose files and pictures ------------------------------------------------------------------
JOINT_COUNTS = (22, 24, 52, 55)  # ours; SMPL, SMPL-H, SMPL-X: the first 22 joints are the same


def count_pose_axes(shape):
    """How many of the last axes of a shape are one pose: 3, 2 or 1; 0 if they are none.

    A pose is rotation matrices (J,3,3) or axis-angles (J,3) or (3J,), J one of JOINT_COUNTS.
    """
    if len(shape) >= 3 and shape[-2:] == (3, 3) and shape[-3] in JOINT_COUNTS:
        return 3
    if len(shape) >= 2 and shape[-1] == 3 and shape[-2] in JOINT_COUNTS:
        return 2
    if len(shape) >= 1 and shape[-1] in [3 * n_joints for n_joints in JOINT_COUNTS]:
        return 1
    return 0


def as_rotations(array, where):
    """Converts the numbers of one pose to rotation matrices (22,3,3) float32, exactly orthonormal.

    array: as in `count_pose_axes`, with any number of axes of length 1 before. where: how error
    messages name it. Matrices within 1e-2 of orthonormal become the nearest rotations (storage in
    bfloat16 alone is off by up to 4e-3). Raises UserError for anything else.
    """
    if array.dtype.kind not in "iuf":
        raise UserError(
            f"{where} holds {array.dtype}, not numbers: give rotation matrices or axis-angles")
    n_axes = count_pose_axes(array.shape)
    if not n_axes or math.prod(array.shape[:-n_axes]) != 1:
        raise UserError(
            f"{where} has the shape {array.shape}: one pose is (22,3,3) or (24,3,3), "
            "or axis-angles (22,3), (24,3), (66,), (72,), (156,), (165,)")

    pose = array.reshape(array.shape[-n_axes:])
    pose = pose[:66] if n_axes == 1 else pose[:22]  # no hands, no face
    pose = torch.as_tensor(pose.astype(np.float64))
    in_range = pose.abs() < 1000  # false for NaN too; no angle in radians is that large
    if not in_range.all():
        raise UserError(
            f"{where} has NaN, infinite or huge numbers in it: a pose is 22 rotations, in radians")

    if n_axes < 3:
        return aa_to_matrix(pose.reshape(22, 3)).float()

    error = (pose @ pose.mT - torch.eye(3)).abs().amax((1, 2))             # (22,)
    is_bad = (error > 1e-2) | (torch.linalg.det(pose) < 0)                 # (22,)
    if is_bad.any():
        joint = int(is_bad.nonzero()[0])
        raise UserError(
            f"{where} is not made of rotations: matrix {joint} ({JOINTS[joint]}) "
            "is not orthonormal with determinant 1")
    left, _, right = torch.linalg.svd(pose)
    return (left @ right).float()  # the nearest rotation, in the least-squares sense


# which way is up in a file: the turn into our frame
UP_TURNS = {
    "y": torch.eye(3),
    "z": Z_UP_TO_Y_UP,
    "camera": torch.tensor([1.0, -1.0, -1.0]).diag(),       # z ahead, y down
}


RATE_KEYS = ("mocap_framerate", "mocap_frame_rate")  # AMASS has both spellings
MOTION_KEYS = ("poses", "root_orient", "pose_body", *RATE_KEYS)


def read_motion(arrays, where):
    """The poses and the frame rate of an AMASS .npz, given as its arrays.

    Understands SMPL+H files (`poses`) and SMPL-X files (`root_orient` and `pose_body`).
    -> axis-angles (T,66), z up; frames per second, or 0 if the file does not say. Raises UserError.
    """
    if "root_orient" in arrays and "pose_body" in arrays:
        root = arrays["root_orient"]
        body = arrays["pose_body"]
        if root.shape[1:] != (3,) or body.shape != (len(root), 63):
            raise UserError(
                f"{where}: root_orient must be (frames,3) and pose_body (frames,63), as in AMASS")
        return np.concatenate([root, body], 1), frame_rate(arrays)

    poses = arrays.get("poses", np.empty(0))
    if poses.ndim != 2 or poses.shape[1] < 66:
        raise UserError(
            f"{where} holds no motion: poses (frames, 66 or more) is needed, as in AMASS")
    return poses[:, :66], frame_rate(arrays)


def frame_rate(arrays):
    """Frames per second of an AMASS .npz, or 0 if it does not say."""
    for key in RATE_KEYS:
        rate = arrays.get(key)
        if rate is not None and rate.size == 1 and rate.dtype.kind in "iuf":
            return float(rate.item())
    return 0.0


def pose_of_frame(poses, frame, where):
    """One frame of a motion (T,66), z up -> rotmat (22,3,3), y up. Raises UserError."""
    if not 0 <= frame < len(poses):
        raise UserError(f"{where} has no frame {frame}: it holds {len(poses)}, counted from 0")
    return turn_root(as_rotations(poses[frame], f"frame {frame} of {where}"), Z_UP_TO_Y_UP)


def pose_from_camera(array, where):
    """A pose in a camera's axes (z ahead, y down) -> rotmat (22,3,3) in ours. Raises UserError.

    array: as `as_rotations` takes it. In our frame +z points towards the camera.
    """
    return turn_root(as_rotations(np.asarray(array), where), UP_TURNS["camera"])


# Where pose files of other programs have their poses, and which way is up there
POSE_KEYS = {
    "rotmat": "y",              # as poses are called here
    "poses": "z",               # AMASS, SMPL-H
    "fullpose": "z",            # MoSh++, SMPL-X
    "smpl_thetas": "camera",    # ROMP
    "pose": "camera",           # VIBE
    "body_pose": "camera",      # 4D-Humans' data sets: root and body in one
}
SPLIT_KEYS = {
    ("root_orient", "pose_body"): "z",          # AMASS, SMPL-X
    ("global_orient", "body_pose"): "camera",   # HMR2, TokenHMR, GVHMR, SMPLify-X
}
# What holds the above; of several, the first one is read. They are looked for before POSE_KEYS: a
# frame of PHALP also has a `pose`, which is none.
GROUP_KEYS = {
    "smpl_params_global": "y",  # GVHMR
    "smpl_params_incam": "camera",
    "pred_smpl_params": "camera",               # HMR2, TokenHMR
    "smpl_params": "camera",
    "smpl": "camera",           # PHALP
    "results": "",              # ROMP: as what it holds says
}
POSE_FILES = (".npy", ".npz", ".pkl", ".pt", ".pth", ".ckpt")


def split_pose_path(path):
    """"people.pkl:3:120" -> "people.pkl", ["3", "120"]. Raises UserError if it is no pose file."""
    suffixes = "|".join(map(re.escape, POSE_FILES))
    match = re.fullmatch(rf"(.+?(?:{suffixes}))((?::[^:]+)*)", str(path), re.IGNORECASE)
    if not match:
        raise UserError(f"{path} is no pose file: give one of {', '.join(POSE_FILES)}, and behind "
                        "it which pose, as in walk.npz:120")
    return match[1], match[2].split(":")[1:]


def read_pose(path, up=""):
    """Reads one pose -> rotmat (22,3,3). Raises UserError on a file that is not one pose.

    Rotation matrices or axis-angles of SMPL, SMPL-H or SMPL-X, see `count_pose_axes`. A .npy file
    is such an array. The others (.npz; .pkl, also of joblib; .pt, .pth or .ckpt of torch) hold it
    under the keys of POSE_KEYS, SPLIT_KEYS and GROUP_KEYS, as arrays, tensors or lists.
    Where a file holds several people or frames, what follows its name chooses one: `walk.npz:120`
    is frame 120, `people.pkl:3:120` is frame 120 of person 3, and `results.pt:smpl_params_incam:9`
    names a key. A level that has one entry only needs no name.
    up: which way is up in the file, a key of UP_TURNS; "": as the kind of file says.
    """
    array, where, usual_up = find_pose_array(path)
    return turn_root(as_rotations(array, where), UP_TURNS[up or usual_up])


def read_frames(path, every=1, up=""):
    """Reads a motion -> frames 0, every, 2 * every ... (T,22,3,3), and frames per second.

    path, up: as for `read_pose`, but no frame is chosen; a single pose is a motion of one frame.
    Frames per second are 0 if the file does not say. Raises UserError.
    """
    array, where, usual_up = find_pose_array(path, is_motion=True)
    if not array.size:
        raise UserError(f"{where} holds no frames")
    n_axes = count_pose_axes(array.shape) or array.ndim     # of another shape: refused below
    motion = array.reshape(-1, *array.shape[array.ndim - n_axes:])

    frames = []
    for k in range(0, len(motion), every):
        frames.append(as_rotations(motion[k], f"frame {k} of {where}"))
    rate = 0.0
    if where.lower().endswith(".npz"):
        rate = frame_rate(read_arrays(pathlib.Path(where), RATE_KEYS))
    return turn_root(torch.stack(frames), UP_TURNS[up or usual_up]), rate


def find_pose_array(path, is_motion=False):
    """Finds the pose that a path names -> an array, where it stood, and which way is up there.

    path: see `read_pose`. is_motion: its frames are all wanted. Raises UserError.
    """
    path, names = split_pose_path(path)
    entry = PoseEntry(path, names, is_motion)
    with as_user_error(f"cannot read {path}: ", "; save its arrays again with numpy.savez"):
        array, usual_up = entry.find(read_pose_file(pathlib.Path(path)))
    if entry.names_left and not set(entry.names_left) <= set(entry.passed):
        name = shorten(entry.names_left[0])
        if is_motion:
            raise UserError(f"all frames of {path} are read: leave out :{name}")
        raise UserError(f"{path} has no frame {name}: it holds 1, which needs no number")
    return array, entry.where, usual_up


def read_pose_file(path):
    """The content of a pose file -> an array, or what `load_pickle` returns; of .npz files a dict.

    Nothing in the file is executed, and no array is made before `to_numbers`. Raises exceptions of
    any kind.
    """
    require_file(path)
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".ckpt"):
        return read_torch_file(path)
    if suffix == ".pkl":
        return read_pickle(path)

    arrays = read_arrays(path, [*POSE_KEYS, *itertools.chain(*SPLIT_KEYS)])
    if "" in arrays:
        return arrays[""]
    with file_errors("it is damaged"), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        for name in set(GROUP_KEYS) & set(names):
            # a dict, which numpy pickles behind the header of an array
            with archive.open(f"{name}.npy") as member:
                content = member.read(MAX_BYTES)
            arrays[name] = load_pickle(content[content.index(b"\n") + 1:])
    return arrays or dict.fromkeys(names)


def join_root(root, body, where):
    """The root's rotation and those of the body, matrices or axis-angles -> one array of poses.

    root (...,3,3) or (...,3), body (...,J,3,3), (...,J,3) or (...,3J); J is 21, 23 or more.
    """
    body_counts = [n_joints - 1 for n_joints in JOINT_COUNTS]
    if body.ndim >= 3 and body.shape[-2:] == (3, 3) and body.shape[-3] in body_counts:
        lead = body.shape[:-3]
        rotation = (3, 3)
    elif body.ndim >= 2 and body.shape[-1] == 3 and body.shape[-2] in body_counts:
        lead = body.shape[:-2]
        rotation = (3,)
    elif body.ndim >= 1 and body.shape[-1] in [3 * n_joints for n_joints in body_counts]:
        lead = body.shape[:-1]
        rotation = (3,)
    else:
        lead = None

    if lead is None or root.size != math.prod(lead + rotation):
        raise UserError(
            f"{where} has a root of shape {root.shape} and a body of shape {body.shape}: both must "
            "be rotation matrices, (1,3,3) and (23,3,3), or both axis-angles, (3,) and (63,)")
    root = root.reshape(*lead, 1, *rotation)
    body = body.reshape(*lead, -1, *rotation)
    return np.concatenate([root, body], len(lead))


MOST_NUMBERS = 2 ** 20  # in nested lists of poses
MOST_NESTED = 10  # dicts and lists in each other


def to_numbers(value):
    """What a file holds in the place of numbers -> their array. Raises FileError."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, Record):
        return to_array(value)
    return list_to_array(value, MOST_NUMBERS)


def is_container(value):
    """Whether a value of a file holds others, rather than numbers."""
    if isinstance(value, Record):
        return value.name == "dict"
    return isinstance(value, (dict, list, tuple))


class PoseEntry:
    """One pose of a file, chosen by names: at each level with several entries, the next name.

    where: the path of the file and the names that were used. names_left: those that were not.
    passed: the names of entries that are alone at their level. is_motion: the frames are not chosen
    from, but taken together.
    """

    def __init__(self, path, names, is_motion=False):
        self.where = path
        self.names_left = list(names)
        self.passed = []
        self.n_frame_axes = int(is_motion)
        self.depth = 0

    def find(self, node, up=""):
        """Descends from a node of the file to the pose -> array, a key of UP_TURNS.

        up: which way is up, if a key above the node says so. Raises UserError.
        """
        self.depth += 1
        if self.depth > MOST_NESTED:  # a pickle may hold a list that holds itself
            raise UserError(f"{self.where} holds entries too deep in each other")

        node = to_element(node)
        if is_container(node) and isinstance(node, dict):
            return self.find_in_dict(node, up)

        first = node[0] if isinstance(node, (list, tuple)) and node else None
        if isinstance(first, dict) and getattr(first, "name", "") != "scalar":
            keys = [str(k) for k in range(len(node))]  # people, or arrays, whose Records are dicts
            return self.find(node[self.choose(keys)], up)

        array = to_numbers(node)
        n_axes = count_pose_axes(array.shape) or array.ndim  # of another shape: refused later
        while array.ndim > n_axes + self.n_frame_axes:
            n_entries = len(array) if array.size else 0
            keys = [str(k) for k in range(n_entries)]
            array = array[self.choose(keys)]
        return array, up or "y"

    def find_in_dict(self, entries, up):
        """The part of `find` for a dict."""
        for (root, body), usual_up in SPLIT_KEYS.items():
            if root in entries and body in entries:
                root = to_numbers(entries[root])
                body = to_numbers(entries[body])
                poses = join_root(root, body, self.where)
                return self.find(poses, up or usual_up)
        groups = [key for key in GROUP_KEYS if key in entries]
        if groups:
            key = groups[0]
            if self.names_left and self.names_left[0] in groups:
                key = self.names_left.pop(0)
                self.where += f":{key}"
            return self.find(entries[key], GROUP_KEYS[key] or up)

        for key, usual_up in POSE_KEYS.items():
            if key in entries:
                return self.find(entries[key], up or usual_up)

        people = {}
        for key, entry in entries.items():
            if is_container(to_element(entry)):
                people[str(key)] = entry
        if not people:
            keys = ", ".join(shorten(str(key)) for key in list(entries)[:12])
            raise UserError(
                f"{self.where} holds no pose under a known key: it has {keys or 'no keys'}, and "
                "needs poses, pose, smpl_thetas, or global_orient with body_pose")
        keys = list(people)
        return self.find(people[keys[self.choose(keys)]], up)

    def choose(self, keys):
        """Chooses one of the entries at a level -> its number. Raises UserError."""
        names = self.names_left
        is_named = bool(names) and names[0] in keys
        if len(keys) == 1 and not (is_named and len(names) > 1):
            self.passed.append(keys[0])
            return 0

        if not names or not keys:
            example = shorten(keys[0]) if keys else "0"
            raise UserError(
                f"{self.where} holds {len(keys)} frames or people, but one pose is needed: choose "
                f"one, for example {self.where}:{example}")
        name = names.pop(0)
        if name in keys:
            number = keys.index(name)
        elif name.isdecimal() and len(name) < 10 and not any(map(str.isdecimal, keys)):
            number = int(name)  # of an entry with a longer name, such as that of a picture
        else:
            number = len(keys)
        if number >= len(keys):
            counted = "counted from 0" if keys[0] == "0" else "named " + shorten(", ".join(keys))
            raise UserError(
                f"{self.where} has no frame {shorten(name)}: it holds {len(keys)}, {counted}")
        self.where += f":{name}"
        return number


def uprightness(rotmat):
    """How far the way from the feet to the head (22,3,3) points up -> -1 (upside down) to 1."""
    joints = forward_kinematics(rotmat, rest_joints())                     # (22,3)
    feet = joints[[JOINTS.index("left_ankle"), JOINTS.index("right_ankle")]].mean(0)
    return float(F.normalize(joints[HEAD] - feet, dim=0)[1])


def upright_reading(path, up=""):
    """The `up` with which `read_pose` would read an upright person, if it does not do so now.

    "" if the head is above the feet as the pose is read, or if no reading has the person upright.
    Raises UserError.
    """
    if uprightness(read_pose(path, up)) >= 0:
        return ""
    heights = {other: uprightness(read_pose(path, other)) for other in UP_TURNS}
    best = max(heights, key=heights.get)
    return best if heights[best] > 0.7 else ""


def write_pose(path, rotmat, fps=30.0):
    """Writes rotmat (22,3,3), or the frames of a motion (T,22,3,3), as an AMASS .npz (z up).

    `read_pose` returns the same poses. fps: frames per second. Raises UserError.
    """
    rotmat = rotmat.detach().cpu().double()  # AMASS stores doubles
    rotmat = turn_root(rotmat.reshape(-1, 22, 3, 3), Z_UP_TO_Y_UP.T)        # (T,22,3,3)
    n_frames = len(rotmat)
    poses = np.zeros((n_frames, 156))  # the 52 joints of SMPL+H, with the fingers at rest
    poses[:, :66] = matrix_to_aa(rotmat).flatten(1)
    with atomic_write(path) as new, open(new, "wb") as file:
        np.savez(
            file,
            poses=poses,
            trans=np.zeros((n_frames, 3)),
            betas=np.zeros(16),
            gender="neutral",
            mocap_framerate=float(fps),
        )


MOST_BYTES = 2**29      # of a picture file
SMALLEST = 16           # pixels of a side of a picture
LARGEST = 8192
MOST_ELONGATED = 20     # the longer side by the shorter one
LARGEST_SQUARE = 2048   # pixels of a side of what `square` cuts out; the model sees 336


@functools.cache
def picture_formats():
    """The formats that Pillow reads by itself; for the others it would start another program."""
    Image.init()
    return sorted(set(Image.OPEN) - {"EPS"})


@contextlib.contextmanager
def undecoded(source):
    """Opens a picture as PIL image and checks its size, before any pixel is decoded.

    source: a path, or [path, first byte, number of bytes (-1: all)]. Raises UserError, also in the
    place of any exception of the decoder.
    """
    if isinstance(source, (str, os.PathLike)):
        source = [source, 0, -1]
    path, first_byte, n_bytes = source
    content = read_bytes(pathlib.Path(path), first_byte, n_bytes)

    advice = (f"give a PNG or JPEG with sides of {SMALLEST} to {LARGEST} pixels, one at most "
              f"{MOST_ELONGATED} times the other")
    with as_user_error(f"{path} cannot be decoded as a picture (", f"); {advice}"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of Pillow, about metadata
            with Image.open(io.BytesIO(content), formats=picture_formats()) as picture:
                width, height = picture.size
                shorter, longer = sorted(picture.size)
                if shorter < SMALLEST or longer > LARGEST or longer > MOST_ELONGATED * shorter:
                    raise UserError(f"{path} is {width}x{height} pixels; {advice}")
                yield picture


def open_picture(source, draft_size=None):
    """Opens a picture of any kind as PIL RGB image, turned upright as its EXIF data says.

    source: see `undecoded`. draft_size: a JPEG may be decoded at a lower resolution, but not below
    this (width, height). Raises UserError.
    """
    with undecoded(source) as picture:
        if draft_size:
            picture.draft("RGB", draft_size)
        return to_rgb(ImageOps.exif_transpose(picture))


def picture_size(source):
    """The width and height of a picture that `open_picture` would return. Raises UserError."""
    with undecoded(source) as picture:
        width, height = picture.size
        is_on_its_side = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)       # orientation
        return (height, width) if is_on_its_side else (width, height)


def read_bytes(path, first_byte, n_bytes):
    """Part of a picture file -> bytes; n_bytes -1: up to its end. Raises UserError."""
    with as_user_error(f"{path} cannot be read (", ")"):
        if path.is_dir():
            raise UserError(f"{path} is a folder; name one picture in it")
        if not path.exists():
            raise UserError(f"there is no image file {path}; check the path")
        if not path.is_file():          # a pipe would wait for ever, a device may have no end
            raise UserError(f"{path} is not a regular file; copy the picture into one")

        if n_bytes < 0:
            n_bytes = path.stat().st_size - first_byte
        if n_bytes > MOST_BYTES:
            raise UserError(f"{path} is a picture of {n_bytes / 2**20:.0f} MB, and at most "
                            f"{MOST_BYTES / 2**20:.0f} are read; save it smaller")
        with open(path, "rb") as file:
            file.seek(first_byte)
            return file.read(n_bytes)


def to_rgb(picture):
    """Any PIL image -> RGB. Deep greys are scaled to 8 bits, transparent parts become white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, np.float64)                                # (H,W)
        values = np.nan_to_num(values, nan=0, posinf=0, neginf=0)
        values = 255 * values / max(values.max(), 1)
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))

    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def square(picture, box=None):
    """Cuts out a box, grown to a square about its middle; without a box, the whole picture.

    box: left, top, width, height in pixels. What lies beyond the border repeats the pixels at the
    border: the model knows backgrounds, but no bars (padded boxes of 118 people: image2pose is
    136 mm off with repeated pixels, 197 mm with grey bars, 489 mm if the square in the middle is
    cut out). -> PIL image of at most LARGEST_SQUARE pixels a side. Raises UserError.
    """
    if box is None:
        if picture.width == picture.height:
            return picture
        box = (0, 0, *picture.size)

    left, top, width, height = box
    side = max(width, height)
    x = left + width / 2
    y = top + height / 2
    check_box(box, picture.size)

    shrink = math.ceil(side / LARGEST_SQUARE)
    if shrink > 1:
        picture = picture.reduce(shrink)
    pixels = np.asarray(picture)                                                # (H,W,3)
    steps = np.arange(round(side / shrink))                                     # (S,)
    columns = steps + round((x - side / 2) / shrink)
    rows = steps + round((y - side / 2) / shrink)
    columns = columns.clip(0, picture.width - 1)        # beyond the border: the pixel at the border
    rows = rows.clip(0, picture.height - 1)
    return Image.fromarray(pixels[rows[:, None], columns])                      # (S,S,3)


def check_box(box, size):
    """Raises UserError unless a box has its middle in a picture and is not far larger than it.

    box: left, top, width, height in pixels; size: width, height of the picture.
    """
    left, top, width, height = box
    x = left + width / 2
    y = top + height / 2
    side = max(width, height)
    is_positive = min(width, height) > 0                    # these are false for NaN, too
    is_inside = 0 <= x <= size[0] and 0 <= y <= size[1]
    if not is_positive or not is_inside or not 1 <= side <= 2 * max(size):
        numbers = ",".join(f"{number:g}" for number in box)
        raise UserError(f"the box {numbers} (left, top, width, height) does not lie in the picture "
                        f"of {size[0]}x{size[1]} pixels")


# ---- 7. Readers of real data sets ----------------------------------------------------------------
# A reader is a generator over one release on disk. It yields records: dicts with the same keys,
# whatever the release. All but the first two are optional.
#
#   id, source    the name of the entry, and of its data set
#   split         "train" | "val" | "test"
#   pose          (22,3,3) float32, y up; that of a picture is in its camera's frame, +z towards it
#   texts         a list: they describe `pose`, or how to get from `start` to `pose`
#   image, box    [file, first byte, number of bytes (-1: all)]; a square [center x, y, side] in it
#   question      about one of the people in the picture; `pose`, `texts` and `box` are this one's
#   start         pose A of a pair, if `pose` is B; start_id, start_image: its entry and its picture
#   together      of a pair: are both poses frames of one sequence? Then B gets the turn that makes
#                 A face front; else each faces front by itself (PoseFix's rule)
#
# A release that cannot be read raises UserError. An unreadable entry is skipped, and the reason
# is appended to the list `skipped`. Entries are checked here once, when they are converted and by
# `check_record`; what uses records relies on it.
def read_amass(path, skipped):
    """AMASS in SMPL+H or SMPL-X layout: one file, a subset, or all of it.

    Takes 12 poses a second (every 10th frame where the file has no frame rate) from the middle
    60 % of each motion, because many motions begin and end in a T-pose (as in TokenHMR).
    """
    new_names = load_asset("amass")  # {old name of a subset: its name today}
    for file in list_files(path, ".npz"):
        if file.name == "shape.npz" or file.stem.endswith("stagei"):
            continue  # the body shape of a subject, no motion

        with skip_bad_entry(skipped, file):
            poses, rate = read_motion(read_arrays(file, MOTION_KEYS), file)
            subset = file.resolve().parts[-3]  # SUBSET/SUBJECT/FILE.npz
            source = f"amass-{new_names.get(subset, subset)}"
            step = max(1, round(rate / 12)) if rate else 10
            margin = len(poses) // 5

            for frame in range(margin, len(poses) - margin, step):
                with skip_bad_entry(skipped, file):
                    pose = pose_of_frame(poses, frame, file).numpy()
                    yield {"id": f"{file}:{frame}", "source": source, "pose": pose}


def find_sequence(amass, name):
    """The file of an AMASS sequence, by its name SUBSET/SUBJECT/FILE.npz.

    Subsets were renamed over the years, so the folder may have the old name or the new one.
    """
    new_names = load_asset("amass")
    subset, _, rest = name.partition("/")
    candidates = [subset, new_names.get(subset, subset)]
    candidates += [old for old, new in new_names.items() if new == subset]
    for candidate in candidates:
        path = amass / candidate / rest
        if path.is_file():
            return path
    return amass / name  # it does not exist, and the attempt to open it says so


def find_poses(folder, amass, numbers):
    """Looks up poses by their PoseScript numbers.

    folder: of the release, for its index. amass: folder of the AMASS SMPL+H that it points into.
    -> {number: (pose (22,3,3), name of its sequence)}, {number: why the pose cannot be read}
    """
    index_files = folder.glob("ids_2_dataset*index*.json")
    index = load_json(check_file(next(index_files, folder / "ids_2_dataset_index.json")))
    found = {}
    missing = {}

    @functools.lru_cache(maxsize=1)
    def open_sequence(name):
        path = find_sequence(amass, name)
        poses, _ = read_motion(read_arrays(path, MOTION_KEYS), path)
        return path, poses

    # sorted by their entries in the index, so that each file is opened once
    by_sequence = sorted(numbers, key=lambda number: str(index.get(number)))
    for number in tqdm(by_sequence, "AMASS", leave=False):
        problems = []
        with skip_bad_entry(problems, f"pose {number}"):
            _, name, frame = index[number]
            path, poses = open_sequence(name)
            found[number] = (pose_of_frame(poses, frame, path).numpy(), name)
        if problems:
            missing[number] = problems[0]
    return found, missing


# The file names of texts in PoseScript v1, v2 and PoseFix
AUTOMATIC = ["posescript_auto_*", "automatic_*", "posefix_auto_*"]
HUMAN = ["posescript_human_*", "human*", "posefix_human_*", "posefix_paraphrases_*"]


def read_texts(folder, patterns):
    """All texts of a PoseScript or PoseFix release -> {entry: [text, ...]}, not yet checked."""
    texts = {}
    for pattern in patterns:
        for file in sorted(folder.glob(f"{pattern}.json")):
            for key, value in load_json(check_file(file)).items():
                new = value if isinstance(value, list) else [value]
                texts.setdefault(key, []).extend(new)
    return texts


def read_splits(folder):
    """The splits of a PoseScript or PoseFix release -> {entry: "train" | "val" | "test"}."""
    splits = {}
    for split in SPLITS:
        for file in folder.glob(f"{split}_*ids*.json"):
            for key in load_json(check_file(file)):
                splits[str(key)] = split
    return splits


def read_posescript(path, amass, skipped, patterns):
    """PoseScript (v1, v2) or PoseFix, whose entries are pairs of poses.

    amass: folder of the AMASS SMPL+H that holds the poses. patterns: AUTOMATIC or HUMAN.
    """
    folder = pathlib.Path(path)
    texts = read_texts(folder, patterns)
    splits = read_splits(folder)

    pairs_file = folder / "pair_id_2_pose_ids.json"
    is_posefix = pairs_file.exists()
    if is_posefix:
        numbers = {str(k): pair for k, pair in enumerate(load_json(check_file(pairs_file)))}
    else:
        numbers = {key: [key] for key in texts}

    wanted = set()
    for key in texts:
        wanted.update(str(number) for number in numbers.get(key, []))
    found, missing = find_poses(folder, pathlib.Path(amass), wanted)

    for key in texts:
        with skip_bad_entry(skipped, f"entry {key}"):
            poses = []
            for number in numbers[key]:
                if str(number) in missing:
                    raise UserError(missing[str(number)])
                poses.append(found[str(number)])

            record = {"id": key, "source": "posescript", "split": splits.get(key, "")}
            if is_posefix:
                (start, start_sequence), (pose, sequence) = poses
                record["source"] = "posefix"
                record["start"] = start
                record["together"] = start_sequence == sequence
            else:
                pose, _ = poses[0]
            yield record | {"pose": pose, "texts": texts[key]}


def picture_record(image, center=None, sides=None, pose=None):
    """The keys that a picture and a person in it give to a record. Raises UserError.

    image: as `open_picture` takes it. center (x, y), sides (width, height): the person's box in
    pixels. It becomes the square that 4D-Humans cuts out: widened to 3:4, then to a square.
    pose: with its root in the camera's axes.
    """
    open_picture(image, (64, 64))  # a picture that cannot be decoded is no entry
    path, first_byte, n_bytes = image
    record = {"image": [str(path), first_byte, n_bytes]}

    if sides is not None:
        x, y = np.asarray(center, float).tolist()
        width, height = np.asarray(sides, float).tolist()
        side = max(height, width * 4 / 3)

        size = picture_size(image)
        check_box((x - width / 2, y - height / 2, width, height), size)
        check_box((x - side / 2, y - side / 2, side, side), size)
        record["box"] = [x, y, side]

    if pose is not None:
        record["pose"] = pose_from_camera(pose, "its pose").numpy()
    return record


MAX_PYD = 2 ** 22  # bytes; one person takes a few thousand
MAX_PEOPLE = 100  # in a picture


def person_array(person, name):
    """One of the arrays of a person. Raises UserError if it is too large to be of one."""
    array = to_array(person[name])
    if array.size > 1000:
        raise UserError(f"the {name} of the person is {array.shape}")
    return array


def person_record(person, image):
    """The record of one person of a 4D-Humans tar.

    image: as `open_picture` takes it. Raises UserError, also for people that HMR2's training drops.
    """
    keypoints = person_array(person, "keypoints_2d")                       # (44,3)
    n_visible = (keypoints[:, 2] > 0.3).sum()
    if n_visible <= 4:
        raise UserError(f"only {n_visible} joints of the person are visible")

    if not person_array(person, "has_body_pose").all():
        raise UserError("the person has no pose")

    # a dict, packed into an array
    fitting_loss = to_element(person.get("extra_info", {}).get("fitting_loss", {}))
    if to_array(fitting_loss.get("reprojection_loss", 0)).max() >= 31_000:
        raise UserError("the body was not fitted well to the person")

    center = person_array(person, "center")
    sides = 200 * person_array(person, "scale")  # the unit of scales in tars is 200 pixels
    return picture_record(image, center, sides, person_array(person, "body_pose"))


def load_people(tar, member):
    """The people in a .data.pyd member of a tar, as load_pickle gives them. Raises UserError."""
    if not member.isreg():  # a link may point to anything
        raise UserError(f"{member.name} is not a plain file")
    pickled = tar.extractfile(member).read(MAX_PYD + 1)  # of a sparse file, zeros without end
    if len(pickled) > MAX_PYD:
        raise UserError(f"{member.name} is larger than {MAX_PYD:,} bytes")
    people = load_pickle(pickled)
    if type(people) is not list or len(people) > MAX_PEOPLE:
        raise UserError(f"{member.name} is not a list of at most {MAX_PEOPLE} people")
    return people


def read_tars(path, skipped):
    """4D-Humans' training data: a tar, or a folder of tars.

    Of each picture KEY.jpg the tar holds KEY.data.pyd, a pickled list of the people in it.
    """
    def key_of(member):
        if member.size < 0:  # tarfile would step back and read the member again, for ever
            raise UserError("a file in the tar has a negative size")
        return re.match(r"(.*/)?[^/.]*", member.name, re.DOTALL)[0]

    for file in list_files(path, ".tar"):
        source = file.resolve().parent.name
        # a truncated tar yields the people before the cut
        with skip_bad_entry(skipped, file), tarfile.open(check_file(file), "r:") as tar:
            for key, members in itertools.groupby(tar, key_of):
                where = f"{file}/{key}"
                with skip_bad_entry(skipped, where):
                    group = {member.name[len(key):].lower(): member for member in members}
                    picture = group.get(".jpeg") or group.get(".png") or group[".jpg"]
                    image = [file, picture.offset_data, picture.size]
                    for person in load_people(tar, group[".data.pyd"]):
                        with skip_bad_entry(skipped, where):
                            entry = {"id": f"{file.name}/{key}", "source": source}
                            yield entry | person_record(person, image)


EVALUATION_KEYS = ("imgname", "center", "scale", "body_pose", "has_body_pose")


def read_evaluation(path, images, skipped):
    """4D-Humans' evaluation data (3DPW, Human3.6M): an .npz, and the folder of its images."""
    arrays = read_arrays(path, EVALUATION_KEYS)
    names = arrays["imgname"]
    # one number for both sides of a box, or one for each
    sides = arrays["scale"].reshape(len(names), -1) * np.ones(2)           # (N,2)
    if np.median(sides) < 20:  # no person is 20 pixels tall: the unit is that of the tars
        sides *= 200

    has_pose = np.zeros(len(names))
    if "body_pose" in arrays:
        has_pose = arrays.get("has_body_pose", np.ones(len(names)))

    for row, name in enumerate(names):
        with skip_bad_entry(skipped, f"{path}, row {row}"):
            name = name.decode() if isinstance(name, bytes) else str(name)
            image = [pathlib.Path(images) / name, 0, -1]
            pose = arrays["body_pose"][row] if has_pose[row] else None
            entry = {"id": f"{name}:{row}", "source": pathlib.Path(path).stem, "split": "test"}
            yield entry | picture_record(image, arrays["center"][row], sides[row], pose)


def read_images(path, skipped):
    """A folder of pictures of any kind that Pillow reads, without poses.

    The file boxes.json in it may locate people: {"a.jpg": [left, top, width, height], ...}, or a
    list of such boxes for a picture.
    """
    folder = pathlib.Path(path)
    boxes_file = folder / "boxes.json"
    boxes = load_json(check_file(boxes_file)) if boxes_file.exists() else {}
    if not isinstance(boxes, dict):
        raise UserError(f"{boxes_file} must hold boxes by the names of pictures")

    for file in sorted(folder.rglob("*")):
        if file == boxes_file or file.is_dir():
            continue
        with skip_bad_entry(skipped, file):
            name = file.relative_to(folder).as_posix()
            entry = {"id": name, "source": folder.resolve().name}
            image = [file, 0, -1]
            if name not in boxes:
                yield entry | picture_record(image)
                continue

            own_boxes = np.array(boxes[name])
            if own_boxes.dtype.kind not in "iuf" or own_boxes.size == 0:
                raise UserError("its boxes in boxes.json are not lists of four numbers")
            for box in own_boxes.reshape(-1, 4).astype(float):
                with skip_bad_entry(skipped, file):
                    corner = box[:2]
                    sides = box[2:]
                    yield entry | picture_record(image, corner + sides / 2, sides)


def read_built(path, skipped, only_refined=False):
    """What `--build` wrote. only_refined: the rows with a refined text, and no other text."""
    for file in list_files(path, ".jsonl"):
        with skip_bad_entry(skipped, file):
            lines = check_file(file).read_bytes().splitlines()
            for number, line in enumerate(lines, 1):
                with skip_bad_entry(skipped, f"{file}, line {number}"):
                    row = json.loads(line)
                    if not only_refined or "refined" in row:
                        yield built_record(row, file.parent, only_refined)


def built_record(row, folder, only_refined):
    """The record of one row of a built data set. Raises exceptions of any kind."""
    record = {"id": row["id"], "source": row["source"], "split": row.get("split", "")}
    record["texts"] = [row["refined"]] if only_refined else row["texts"]
    record["pose"] = as_rotations(np.array(row["pose"]), "pose").numpy()
    record |= picture_record([folder / row["image"], 0, -1])
    if "start" in row:
        record["start"] = as_rotations(np.array(row["start"]), "start").numpy()
        record["start_id"] = row["start_id"]
        record["start_image"] = picture_record([folder / row["start_image"], 0, -1])["image"]
    return record


def read_questions(path, images, skipped):
    """Questions about pictures: a file of JSON lines, and the folder of its pictures.

    {"image": "a.jpg", "question": "What pose does the one in red have?"}, and what is known of the
    answer: "pose" of the person who is asked for, as `as_rotations` takes it, with its root in the
    camera's axes (z ahead, y down); "answer", a text; "box" around this person, [left, top, width,
    height] in pixels.
    """
    for number, line in enumerate(check_file(path).read_bytes().splitlines(), 1):
        with skip_bad_entry(skipped, f"{path}, line {number}"):
            row = json.loads(line)
            if not isinstance(row, dict) or not is_usable_text(row.get("question")):
                raise UserError("it has no question")

            center = None
            sides = None
            if "box" in row:
                left, top, width, height = map(float, row["box"])
                center = (left + width / 2, top + height / 2)
                sides = (width, height)
            pose = np.array(row["pose"]) if "pose" in row else None
            image = [pathlib.Path(images) / row["image"], 0, -1]
            record = picture_record(image, center, sides, pose)

            record["id"] = f"{row['image']}:{number}"
            record["source"] = pathlib.Path(path).stem
            record["question"] = row["question"]
            if "answer" in row:
                record["texts"] = [row["answer"]]
            yield record


def read_embedded(path, skipped):
    """People of the embedded world, "train:2000", in their camera's frame."""
    split, _, n = path.partition(":")
    for i, pose in enumerate(World(split, int(n)).camera_poses.numpy()):
        yield {"id": str(i), "source": f"world-{split}", "split": split, "pose": pose}


class Reader(NamedTuple):
    """How one kind of data set is named and read."""

    usage: str  # what follows "KIND:" in the name of a data set
    read: Callable  # takes what follows "KIND:", cut at the commas of `usage`, and `skipped`


READERS = {
    "amass": Reader("PATH", read_amass),
    "tars": Reader("PATH", read_tars),
    "evaluation": Reader("NPZ,IMAGES", read_evaluation),
    "images": Reader("FOLDER", read_images),
    "posescript_a": Reader(
        "RELEASE,AMASS", functools.partial(read_posescript, patterns=AUTOMATIC)),
    "posescript_h": Reader("RELEASE,AMASS", functools.partial(read_posescript, patterns=HUMAN)),
    "posefix_a": Reader("RELEASE,AMASS", functools.partial(read_posescript, patterns=AUTOMATIC)),
    "posefix_h": Reader("RELEASE,AMASS", functools.partial(read_posescript, patterns=HUMAN)),
    "built": Reader("FOLDER", read_built),
    "questions": Reader("JSONL,IMAGES", read_questions),
    "refined": Reader("FOLDER", functools.partial(read_built, only_refined=True)),
    "world": Reader("SPLIT:N", read_embedded),
}


def parse_spec(spec):
    """The name of a data set, "KIND:PATH" -> its read function, its paths. Raises UserError."""
    kind, _, rest = spec.partition(":")
    if kind not in READERS:
        known = ", ".join(f"{kind}:{reader.usage}" for kind, reader in READERS.items())
        raise UserError(f"{spec!r} is not a data set: give {known}")

    usage, read = READERS[kind]
    n_commas = usage.count(",")
    paths = rest.rsplit(",", n_commas)
    if len(paths) <= n_commas:
        raise UserError(f"{spec!r} is not a data set: give {kind}:{usage}")
    return read, paths


MOST_CHARACTERS = 10_000  # of a text


def check_file(path):
    """The path itself. Raises UserError unless it is a regular file: a pipe may never end."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}, from which JSON or a tar can be read: check the path")
    return path


def check_record(record, skipped):
    """Makes sure that a record is as section 7 promises -> the record, without unusable texts.

    Poses, pictures and boxes were checked where they were converted: by `as_rotations` and
    `picture_record`. skipped: gets the reason for each text that is left out. Raises UserError.
    """
    record = dict(record)
    for key in ("id", "start_id", "source"):
        if key in record:
            record[key] = check_name(record[key], key)
    if record.get("split", "") not in ("", *SPLITS):
        raise UserError(f"its split is not one of {', '.join(SPLITS)}")

    if "texts" in record:
        if not isinstance(record["texts"], list):
            raise UserError("its texts are not a list")
        texts = [text for text in record["texts"] if is_usable_text(text)]
        n_unusable = len(record["texts"]) - len(texts)
        if not texts:
            raise UserError("it has no text")
        if n_unusable:
            skipped.append(f"{record['id']}: texts that are empty, too long, or none: {n_unusable}")
        record["texts"] = texts
    return record


def check_name(name, key):
    """The name of an entry or source, printable, from text or a whole number. Raises UserError."""
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not 1 <= len(name) <= 1000:
        raise UserError(f"its {key} is not a name")
    return name.encode("utf-8", "replace").decode()  # file names may hold bytes of other encodings


def is_usable_text(text):
    """Is it a text with at least one letter, which UTF-8 can hold?"""
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        return False
    has_lone_surrogate = re.search("[\ud800-\udfff]", text)  # JSON allows it, UTF-8 does not
    has_letter = any(map(str.isalnum, text))
    return has_letter and not has_lone_surrogate


def read_records(specs):
    """Reads data sets, ["KIND:PATH", ...] with the kinds of READERS -> a list of all records.

    Prints how many entries were skipped, and why. Raises UserError.
    """
    records = []
    for spec in specs:
        read, paths = parse_spec(spec)
        skipped = []
        try:
            found = []
            for record in tqdm(read(*paths, skipped), spec, leave=False):
                with skip_bad_entry(skipped, f"entry {record['id']}"):
                    found.append(check_record(record, skipped))
        except Exception as error:  # a release with another layout can raise any exception
            raise UserError(f"{spec} cannot be read: {first_line(error)}") from error

        if skipped:
            print(f"{spec}: entries left out: {len(skipped)}, for example", file=sys.stderr)
            for reason in skipped[:3]:
                reason = reason[:500].encode("utf-8", "backslashreplace").decode()
                print(f"    {reason}", file=sys.stderr)
        if not found:
            raise UserError(f"{spec} holds nothing that can be read: check the path")
        records += found
    return records


def records_with_pose(specs):
    """The records of data sets that have a single pose, and all these poses (M,22,3,3).

    Raises UserError.
    """
    records = []
    for record in read_records(specs):
        if "pose" in record and "start" not in record:
            records.append(record)
    if not records:
        raise UserError("there are no poses: give --poses KIND:PATH")
    return records, torch.tensor(np.stack([record["pose"] for record in records]))


def crop_picture(record, size, prefix=""):
    """Cuts the person out of a record's picture -> PIL (size,size).

    The record's box, or the whole picture, is padded to a square. prefix: "start_" for the picture
    of pose A, which has no box.
    """
    picture = open_picture(record[prefix + "image"])
    box = None
    if "box" in record and not prefix:
        x, y, side = record["box"]
        box = (x - side / 2, y - side / 2, side, side)
    return square(picture, box).resize((size, size))


def summarise(records, path, body, n_drawn=16):
    """Prints counts and ranges of records, and draws some of them, spread evenly."""
    print_counts(records)
    print_ranges(records)

    cells = []
    step = math.ceil(len(records) / n_drawn)
    for record in records[::step]:
        for prefix, which in [("start_", "picture A"), ("", "picture")]:
            if prefix + "image" in record:
                picture = crop_picture(record, CELL, prefix)
                cells.append((f"{record['source']}, {which}", picture))
        for key, which in [("start", "pose A"), ("pose", "pose")]:
            if key in record:
                cells.append((f"{record['source']}, {which}", draw_pose(record[key], body)))
    save_cells(cells, path)


def print_counts(records):
    """Prints how many records each split of each data set has."""
    counts = Counter((record["source"], record.get("split", "")) for record in records)
    for (source, split), n in counts.most_common(20):
        print(f"{source:<28}{split:<6}{n:>9} entries")


def print_ranges(records):
    """Prints the ranges of what is easily wrong in data: lengths, sizes and angles."""
    n_words = []
    box_sides = []
    poses = []
    for record in records:
        n_words += [len(text.split()) for text in record.get("texts", [])]
        if "box" in record:
            box_sides.append(record["box"][2])
        poses += [record[key] for key in ("start", "pose") if key in record]

    poses = torch.tensor(np.array(poses)).view(-1, 22, 3, 3)
    bends = matrix_to_aa(poses[:, 1:]).norm(dim=-1).rad2deg()              # (M,21)
    tilts = poses[:, 0, 1, 1].clamp(-1, 1).arccos().rad2deg()              # (M,) of the y axis

    print_range("words in a text", n_words)
    print_range("pixels, side of a box", box_sides)
    print_range("degrees, bend of a joint", bends.flatten().tolist())
    print_range("degrees, pelvis off upright", tilts.tolist())


def print_range(name, values):
    """Prints the number, range and mean of some values; nothing if there are none."""
    if values:
        spread = f"{min(values):.0f} to {max(values):.0f}, mean {np.mean(values):.0f}"
        print(f"{name:<30}{len(values):>11}   {spread}")


def save_cells(cells, path, n_columns=8):
    """Saves cells [(name, picture), ...] as one PNG, n_columns in a row. Raises UserError."""
    rows = [("", cells[k:k + n_columns]) for k in range(0, len(cells), n_columns)]
    save_png(contact_sheet(rows), path)


# ---- 8. ImageScript and ImageDiff ----------------------------------------------------------------
# UniPose, appendix A: all poses --farthest-point sampling--> poses B, each with a picture and three
# captions (ImageScript). ImageDiff gives each B a pose A, one of its 100 nearest poses that differs
# enough, and the texts say how to get from A to B.
PICTURE_SIZE = 336  # pixels, the input size of CLIP ViT-L/14
REFINE_PROMPT = (
    "Rewrite this description of a person's pose in natural, concise English without repetitions. "
    "Keep every body part that it names, and whether it is the left or the right one. Answer with "
    "the description alone. "
)


def mean_joint_distance(points, other):
    """points (M,22,3), other (22,3) -> mean distance of corresponding joints (M,)."""
    square = (points - other) ** 2
    # adding up the three axes is much faster than .sum(-1)
    return np.sqrt(square[..., 0] + square[..., 1] + square[..., 2]).mean(-1)


def farthest_points(points, n, start=0):
    """Farthest-point sampling of bodies (M,22,3) -> n <= M indices, a list that begins with start.

    Each choice is the body that is farthest, in mean joint distance, from all earlier choices.
    Exact, but most of the n x M distances are never computed: by the triangle inequality, a new
    choice cannot be nearer to a body than that body's nearest choice c if it is at least twice as
    far from c as the body is.
    """
    distance = np.full(len(points), np.inf, np.float32)                    # (M,) to nearest choice
    nearest = np.zeros(len(points), np.int32)                              # (M,) that choice
    chosen = np.empty((n, *points.shape[1:]), np.float32)                  # (n,22,3)
    order = []

    for k in tqdm(range(n), "farthest points", leave=False):
        index = int(distance.argmax()) if k else int(start)
        order.append(index)
        chosen[k] = points[index]

        to_choices = mean_joint_distance(chosen[:k + 1], chosen[k])        # (k+1,)
        can_be_nearer = to_choices[nearest] < 2.001 * distance             # .001 for rounding
        candidates = np.flatnonzero(can_be_nearer)
        to_candidates = mean_joint_distance(points[candidates], chosen[k])

        is_nearer = to_candidates < distance[candidates]
        moved = candidates[is_nearer]
        distance[moved] = to_candidates[is_nearer]
        nearest[moved] = k
        distance[index] = -1  # never chosen again, even if all other bodies are its duplicates
    return order


def n_different(category, others):
    """In how many codes others (n,S+P) differ from category (S+P,) -> (n,).

    The rotation of the head is not counted, as in PoseFix.
    """
    is_counted = [not row["kind"].startswith("relativeRot") for row in pose_table().columns]
    n_super = len(category) - len(is_counted)
    is_counted += [True] * n_super
    return (others != category)[:, is_counted].sum(1)


def choose_partners(chosen, features, category, least, rng):
    """Chooses a pose A for each pose B -> {b: a}, without the poses B that have no partner.

    A is a random one of the 100 poses that are nearest to B by the cosine of their features and
    differ from B in at least `least` codes. (a, b) and (b, a) are never both chosen.
    chosen: indices of poses B; features (M,d); category (M,S+P); rng: np.random.Generator.
    """
    features = F.normalize(torch.as_tensor(features).float())
    n_nearest = min(101, len(features))  # one more, since each pose is its own nearest
    pairs = {}
    for part in torch.as_tensor(chosen).split(128):
        cosine = features[part] @ features.T                               # (128,M)
        nearest = cosine.topk(n_nearest).indices.numpy()                   # (128,101)
        for b, near in zip(part.tolist(), nearest):
            differs = n_different(category[b], category[near]) >= least
            shuffled = rng.permutation(near[differs & (near != b)]).tolist()
            candidates = [a for a in shuffled if pairs.get(a) != b]
            if candidates:
                pairs[b] = candidates[-1]
    return pairs


NAMED_PART = re.compile(
    r"\b(?:(left|right)\s+)?(?:upper\s+)?"
    r"(hand|wrist|(?:fore)?arm|elbow|shoulder|foot|ankle|shin|knee|thigh|leg|hip"
    r"|head|neck|torso|body)(s?)\b")


def body_parts_in(text):
    """The body parts that a text names, with their sides: {("left", "knee"), ("", "head"), ...}.

    A plural without a side stands for both: "knees" are the left one and the right one.
    """
    text = text.lower().replace("feet", "foots")  # the pattern knows regular plurals only
    parts = set()
    for side, part, plural in NAMED_PART.findall(text):
        if plural and not side:
            parts |= {("left", part), ("right", part)}
        else:
            parts.add((side, part))
    return parts


def load_refiner(path):
    """Loads a Hugging Face chat model from a folder -> refine(text), as GPT-4 does in the paper.

    refine returns the rewritten text, or None if a body part or its side was lost.
    Raises UserError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with as_user_error(f"--refine {path} is not a folder of a chat model and its tokenizer: "):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, use_safetensors=True)
        tokenizer.apply_chat_template([{"role": "user", "content": ""}])  # fails if it has none
    model.eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def refine(text):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": REFINE_PROMPT + text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=200, do_sample=False)[0]
        answer_ids = ids[inputs["input_ids"].size(1):]
        answer = tokenizer.decode(answer_ids, skip_special_tokens=True)
        answer = " ".join(answer.split())
        return answer if body_parts_in(text) <= body_parts_in(answer) else None

    return refine


class Choice(NamedTuple):
    """A row to build: its split, and the indices of its poses among the records."""

    split: str
    b: int
    a: int | None  # pose A of ImageDiff; None in ImageScript


def parse_quota(quota):
    """"world=50:test" -> "world", 50, "test"; the split is "train" by default. Raises UserError."""
    match = re.fullmatch(r"(.*)=(\d+)(?::(train|val|test))?", quota)
    if not match:
        raise UserError(f"--quota {quota} is not of the form SOURCE=NUMBER[:SPLIT]")
    source, n, split = match.groups()
    return source, int(n), split or "train"


def load_features(path, specs, n_poses):
    """Reads the retrieval features that eval.py wrote, (M,d), one row a pose. Raises UserError.

    specs: the data sets of --poses, which hold n_poses poses.
    """
    poses = " ".join(f"--poses {shlex.quote(spec)}" for spec in specs)
    command = f"python eval.py {poses} --features {shlex.quote(path or 'features.npy')}"
    if not path:
        raise UserError(f"--build imagediff needs --features, the file that this writes: {command}")
    features = read_arrays(path, ()).get("", np.empty(0))
    if features.ndim != 2 or len(features) != n_poses:
        raise UserError(f"--features {path} must hold a row for each of the {n_poses} poses; write "
                        f"it anew: {command}")
    return features


def choose_rows(config, records, front, body):
    """Chooses the poses that the quotas ask for -> [Choice, ...]. Raises UserError.

    front: the poses of the records, facing front (M,22,3,3). body: whose joints are compared.
    """
    # distances are those of bodies at orientation zero
    level = front.clone()
    level[:, 0] = torch.eye(3)
    joints = [forward_kinematics(part, body.rest) for part in level.split(10_000)]
    joints = torch.cat(joints).numpy()                                     # (M,22,3)

    is_pair = config.build == "imagediff"
    if is_pair:
        features = load_features(config.features, config.poses, len(records))
        category = np.concatenate([posecodes(part).category for part in front.split(1000)])

    rng = np.random.default_rng(config.seed)
    is_free = np.ones(len(records), bool)
    rows = []
    for quota in config.quota or [f"={len(records)}"]:  # by default all poses, of any source
        source, n, split = parse_quota(quota)
        is_source = np.array([record["source"].startswith(source) for record in records])
        pool = np.flatnonzero(is_free & is_source)
        if not 1 <= n <= len(pool):
            raise UserError(
                f"--quota {quota} asks for {n} poses, but {len(pool)} of this source are left: "
                "ask for at least 1, and at most those")

        chosen = farthest_points(joints[pool], n, rng.integers(len(pool)))
        is_free[pool[chosen]] = False
        if is_pair:
            pairs = choose_partners(chosen, features[pool], category[pool], config.differ, rng)
            new = [Choice(split, pool[b], pool[a]) for b, a in pairs.items()]
        else:
            new = [Choice(split, pool[b], None) for b in chosen]
        print(f"{len(new)} rows out of {len(pool)} poses {quota}")
        rows += new
    return rows


def build_data_set(config, out):
    """Builds ImageScript or ImageDiff from the poses of any data sets. Raises UserError.

    Writes rows to OUT/imagescript.jsonl or OUT/imagediff.jsonl and pictures to OUT/images.
    """
    body = load_body(config.body)
    refine = load_refiner(config.refine) if config.refine else None
    records, poses = records_with_pose(config.poses)
    front = face_front(poses)
    rows = choose_rows(config, records, front, body)
    to_refine = choose_refined(rows, config.refined, config.seed) if refine else set()
    n_kept = 0

    path = out / f"{config.build}.jsonl"
    with atomic_write(path) as new, open(new, "w", encoding="utf-8") as file:
        for k, (split, b, a) in enumerate(tqdm(rows, config.build, leave=False)):
            row = write_half(records[b], poses[b], b, config.seed, out, body)
            row |= {"source": records[b]["source"], "split": split}
            if a is not None:
                half = write_half(records[a], poses[a], a, config.seed, out, body)
                row |= {"start_id": half["id"], "start_image": half["image"], "start": half["pose"]}

            codes = posecodes(front[[b]]) if a is None else paircodes(front[[a]], front[[b]])
            rng = np.random.default_rng((config.seed, k))
            row["texts"] = [full_caption(codes, 0, rng) for _ in range(3)]

            if k in to_refine:
                row["refined"] = refine(row["texts"][0])
                if not row["refined"]:
                    row["refined"] = row["texts"][0]
                    n_kept += 1
            file.write(json.dumps(row) + "\n")

    summary = f"{len(rows)} rows in {out}"
    if refine:
        summary += f"; {len(to_refine)} refined, {n_kept} kept as they were"
    print(summary)


def choose_refined(rows, n_train, seed):
    """The numbers of the rows whose texts are refined, a set: n_train of train (0: all), as UniPose
    does with 6,250 of them, and all of the other splits.
    """
    train = [k for k, row in enumerate(rows) if row.split == "train"]
    others = [k for k, row in enumerate(rows) if row.split != "train"]
    if n_train:
        train = np.random.default_rng(seed).permutation(train)[:n_train].tolist()
    return {*train, *others}


def write_half(record, pose, k, seed, out, body):
    """Writes the picture of one pose -> what a row says of the pose.

    record, pose (22,3,3): the record and its pose, k: their number among all. The picture is the
    record's own, or a rendered photograph of the body if it has none.
    """
    if "image" in record:
        picture = crop_picture(record, PICTURE_SIZE)
    else:
        look = np.random.default_rng((seed, k, 0))
        rng = np.random.default_rng((seed, k, 1))
        photo, _ = render_photo(pose, PICTURE_SIZE, look, rng, body)
        picture = Image.fromarray(photo)

    name = f"images/{k:06d}.jpg"
    with atomic_write(out / name) as new:
        picture.save(new, format="JPEG", quality=92)
    axis_angles = matrix_to_aa(pose).double().flatten().numpy().round(6)   # (66,)
    return {"id": record["id"], "image": name, "pose": axis_angles.tolist()}


# ---- 9. Run it: one example of each task ---------------------------------------------------------
@dataclass
class Config:
    """Print one example of each task and draw people; or check real data; or build a data set."""
    split: str = "train"  # split of the embedded world: train | val | test | test_wide
    seed: int = 0  # random seed of the examples, or of the data set to build
    out: str = ""  # folder for the files that are written; empty: out
    speed: int = 0  # time the full captions of this many poses instead
    check: list[str] = field(default_factory=list)  # KIND:PATH, data set to summarise
    build: str = ""  # data set to build: imagescript | imagediff
    poses: list[str] = field(default_factory=list)  # --build: KIND:PATH, source of poses
    quota: list[str] = field(default_factory=list)  # SOURCE=NUMBER[:SPLIT]; default: all poses
    features: str = ""  # imagediff: .npy that eval.py --features wrote for the same --poses
    differ: int = 10  # imagediff: minimum number of codes in which the poses of a pair differ
    refine: str = ""  # --build: folder of a chat model that rewrites texts
    refined: int = 0  # --refine: train rows to refine, drawn at random; 0: all; others: always all
    body: str = ""  # --build, --check: SMPL file of the body to draw and to compare; empty: ours


def time_captions(split, n, seed):
    """Prints how fast full captions are made, and the peak memory of the process."""
    import resource  # not on Windows

    _, poses, _ = sample_people(split, 10_000)
    poses = itertools.islice(itertools.cycle(poses), n)
    n_words = 0
    start = time.process_time()
    for text in full_captions(poses, seed):
        n_words += len(text.split())
    rate = n / (time.process_time() - start)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{rate:,.0f} captions of {n_words / n:.0f} words in a second of processor time, "
        f"at most {peak:,.0f} MB of memory")


def print_examples(split, seed):
    """Prints one training example of each task."""
    world = World(split, 64)
    for task in TASKS:
        print(f"\n{task}")
        _, segments = Mixture([task], seed, world)[0]
        print_segments(segments)


def print_segments(segments):
    """Prints segments, one a line, those of earlier turns first."""
    for kind, value, is_target in segments:
        arrow = "->" if is_target else "  "
        if kind == "turn":
            print_segments(value)
        elif kind == "text":
            print(f"  {arrow} {value.strip()}")
        else:
            shape = " x ".join(map(str, value.shape))
            print(f"  {arrow} <{kind}> {shape}")


def draw_people(split, path, n=32):
    """Saves photographs of the first n people of a split; every second one is an edit."""
    world = World(split, n, size=CELL)
    cells = []
    for i in range(n):
        name = f"{world.activity[i] or 'no activity'} {world.side[i]}"
        if i % 2:
            name = "an edit of it"
        cells.append((name, world.image(i)))
    save_cells(cells, path)


def print_statistics(split):
    """Prints how large and how varied the embedded world is."""
    joints = forward_kinematics(World(split, 4000).poses, rest_joints())   # (4000,22,3)
    distance = 1000 * (joints[0::2] - joints[1::2]).norm(dim=-1).mean()
    print(
        f"\n{len(activity_table().activities)} activities, {len(vocabulary())} words, "
        f"{len(TASKS)} tasks; the poses of a pair are "
        f"{distance:.0f} mm apart (mean of 2,000 pairs)")


def main(argv=None):
    """Prints one example of each task and draws people, or checks or builds a data set."""
    config = cli(Config, argv)
    if config.build not in ("", "imagescript", "imagediff"):
        raise UserError(f"--build {config.build} must be imagescript or imagediff")
    if config.differ < 0 or config.refined < 0:
        raise UserError("--differ and --refined must be at least 0")
    out = pathlib.Path(config.out or f"out/{config.build}")

    if config.build:
        build_data_set(config, out)
    elif config.check:
        body = load_body(config.body)
        summarise(read_records(config.check), out / "check.png", body)
    elif config.speed > 0:
        time_captions(config.split, config.speed, config.seed)
    else:
        print_examples(config.split, config.seed)
        draw_people(config.split, out / "world.png")
        print_statistics(config.split)
        print(f"photographs of 32 people: {out / 'world.png'}")


if __name__ == "__main__":
    run_main(main)
