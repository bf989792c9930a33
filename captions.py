"""Describes a pose in words, and checks a text against a pose.

Whether a caption is true is usually a matter of opinion. The captions of this file can be checked,
because every statement in them started as a number:

    pose ──measure──► 170.9 degrees at the left knee
                          │
                        name      0 ·· completely bent ·· 45 ·· bent more ·· 75 ·· right angle ··
                          ▼       105 ·· bent less ·· 135 ·· slightly bent ·· 160 ·· straight ··
        Code("left", "knee", "straight")
                   │          ▲
                  say     read back    and check: a code is true or false of any pose
                   ▼          │
          "The left knee is straight."

1. Measure. 271 angles, distances, heights and tilts, taken at 35 keypoints (section 1).
2. Name. Thresholds cut every number into a few categories with names: a *posecode*, such as
   "straight". Formulas over posecodes name what takes several of them, such as kneeling:
   *super-posecodes* (section 2). *Paircodes* name the difference between two poses, such as
   "bend the left knee more" (section 3).
3. Say. A short caption chooses the codes that tell most about the pose (section 5). A full caption
   says everything worth saying, in sentences that share what they can (section 6).
4. Read back. All clauses that can be said are in one table, so a text turns back into exactly the
   codes that it was made of, and each of these is true or false of a pose (section 7). That is how
   `eval.py` marks what a model writes.

Letters: M poses, J=22 joints, S columns of a table (271 of posecodes, 50 of paircodes), P
super-codes (150 and 52). Points are in metres: y up, +z front, +x the person's left.

Sources: posecodes and captions are PoseScript's (Delmas et al. 2022), paircodes and difference
texts PoseFix's (Delmas et al. 2023), used as in UniPose's data (appendix A). Thresholds and rules
are the published ones, the phrases our own. Left out: random noise on the numbers, contacts found
on the skin, pronouns for the person, connectives such as "while", and rewriting by a chat model
(that is `data.py --refine`).

The thresholds are metres, so everybody is measured on one skeleton: SMPL's neutral one of mean
shape, as in PoseScript. The free body has its joints; a --body of the other scripts is drawn, or
used in losses and errors, and changes no caption.

    python captions.py              # one pose: measured, named, described, the description checked
    python captions.py --seed 1     # the same in other words
"""
import dataclasses
import functools
import itertools
import math
import re
import textwrap
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from tokenizer import (
    JOINTS, PARENTS, cli, example_pose, face_front, forward_kinematics, load_asset, load_body,
    matrix_to_aa, run_main,
)


# ---- 1. Measure ----------------------------------------------------------------------------------
# The 35 keypoints are the joints, and points that people speak of but skeletons do not have.
SIDES = ("left", "right")
SEGMENTS = {  # keypoints halfway between two others
    "hand": ("wrist", "middle2"),
    "thigh": ("hip", "knee"),
    "shin": ("knee", "ankle"),
    "upperarm": ("shoulder", "elbow"),
    "forearm": ("elbow", "wrist"),
}
KEYPOINTS = [
    *JOINTS, "left_middle2", "right_middle2", "left_hand", "right_hand", "torso",
    "left_thigh", "right_thigh", "left_shin", "right_shin",
    "left_upperarm", "right_upperarm", "left_forearm", "right_forearm",
]
HAND_LENGTH = 0.1367  # metres from the wrist to middle2, the second joint of the middle finger
X_AXIS = np.array([1, 0, 0], np.float32)
Y_AXIS = np.array([0, 1, 0], np.float32)
FLOOR_KINDS = ("relativeVAxis", "onGround", "bodyInclineX", "bodyInclineZ")  # relate to the floor


def find_keypoints(joints):
    """Joints (M,22,3) -> keypoints (M,35,3)."""
    points = dict(zip(JOINTS, np.moveaxis(np.asarray(joints, np.float32), 1, 0)))    # (M,3) each

    for side in SIDES:
        wrist = points[f"{side}_wrist"]
        forearm = wrist - points[f"{side}_elbow"]
        length = np.maximum(np.linalg.norm(forearm, axis=-1, keepdims=True), 1e-9)
        # the 22 joints end at the wrist: the hand is taken to continue the forearm
        points[f"{side}_middle2"] = wrist + HAND_LENGTH * forearm / length
        for part, (start, end) in SEGMENTS.items():
            points[f"{side}_{part}"] = (points[f"{side}_{start}"] + points[f"{side}_{end}"]) / 2

    points["torso"] = (points["pelvis"] + points["neck"] + points["spine3"]) / 3
    return np.stack([points[name] for name in KEYPOINTS], 1)


def angle_between(u, v):
    """The angle between vectors (...,3), degrees."""
    lengths = np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1)
    cosine = (u * v).sum(-1) / np.maximum(lengths, 1e-12)
    # rounding may push the cosine of a folded joint above 1, where arccos is NaN
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def body_incline(axis, left, right, pelvis, left_ankle, right_ankle):
    """How far the trunk leans forward (axis X), twists to the right (Y) or leans left (Z).

    left, right: the shoulders; all points (M,1,3). Returns degrees (M,1).
    """
    shoulders = (left + right) / 2
    up = shoulders - pelvis

    if axis == "Y":
        across = left - right
        return np.degrees(np.arctan2(across[..., 2], across[..., 0]))
    if axis == "Z":
        return 90 - angle_between(up, X_AXIS)

    # of a person upside down, leaning forward or back has no meaning
    lowest_ankle = np.minimum(left_ankle[..., 1], right_ankle[..., 1])
    is_upright = lowest_ankle < shoulders[..., 1] - 0.2
    return np.where(is_upright, np.degrees(np.arctan2(up[..., 2], up[..., 1])), np.nan)


def head_angle(axis, rotmat, top):
    """How the head is turned: one of three Euler angles, degrees (M,1).

    The local rotations (M,22,3,3) from joint `top` down to the head multiply to Rz(c) Ry(b) Rx(a).
    Axis X stands for a, Y for b, Z for c.
    """
    joint = JOINTS.index("head")
    R = rotmat[:, joint]                                                             # (M,3,3)
    while joint != top:
        joint = PARENTS[joint]
        R = rotmat[:, joint] @ R

    if axis == "X":
        radians = np.arctan2(R[:, 2, 1], R[:, 2, 2])
    elif axis == "Y":
        radians = np.arctan2(-R[:, 2, 0], np.hypot(R[:, 2, 1], R[:, 2, 2]))
    else:
        radians = np.arctan2(R[:, 1, 0], R[:, 0, 0])
    return np.degrees(radians)[:, None]


def measure(kind, joint_sets, keypoints, rotmat):
    """The values of n columns of one kind (M,n), metres or degrees.

    kind: "angle", "relativePosY" ...; "pair_angle" ... for one pose of a pair.
    joint_sets (n,k): the k keypoints of each column. keypoints (M,35,3), rotmat (M,22,3,3).
    """
    name = kind.removeprefix("pair_")
    axis = kind[-1]  # of kinds that end in X, Y or Z
    points = [keypoints[:, column] for column in joint_sets.T]                       # (M,n,3) each

    if name == "angle":  # at the second of three joints
        a, b, c = points
        return angle_between(a - b, c - b)
    if name == "distance":
        a, b = points
        return np.linalg.norm(a - b, axis=-1)
    if name == "lift":  # of a line from a to b: 0 hangs down, 90 is level, 180 points up
        a, b = points
        return angle_between(b - a, -Y_AXIS)
    if name == "facing":  # of the chest: 0 to the ceiling, 180 to the floor
        left, right, neck, pelvis = points
        return angle_between(np.cross(left - right, neck - pelvis), Y_AXIS)
    if name == "relativeVAxis":  # between a line, which has no direction, and the vertical
        a, b = points
        tilt = angle_between(a - b, Y_AXIS)
        return np.minimum(tilt, 180 - tilt)
    if name == "onGround":  # height above the lowest keypoint
        floor = keypoints[..., 1].min(-1, keepdims=True)                             # (M,1)
        return points[0][..., 1] - floor
    if name.startswith("bodyIncline"):
        return body_incline(axis, *points)
    if name.startswith("relativeRot"):
        return head_angle(axis, rotmat, top=joint_sets[0, 1])

    # relativePos: where a is, seen from b; in a pair, a itself, to be compared with the other pose
    a, b = points
    offset = a if kind.startswith("pair_") else a - b
    return offset[..., "XYZ".index(axis)]


def measure_columns(table, keypoints, rotmat, body_frame=None):
    """All values (M,S) of a CodeTable.

    body_frame: of `stand_upright`, for everything that does not relate to the floor.
    """
    values = []
    for kind, joint_sets in table.groups:
        if kind == "rotation":  # of the body from pose A to B: `paircodes_at` adds this column
            continue
        frame = keypoints, rotmat
        if body_frame and not kind.endswith(FLOOR_KINDS):
            frame = body_frame
        values.append(measure(kind, joint_sets, *frame))
    return np.concatenate(values, 1)


def stand_upright(keypoints, rotmat):
    """Turns poses into the body's own frame: the trunk vertical, the hips facing the front.

    keypoints (M,35,3), rotmat (M,22,3,3). Returns both.
    """
    pelvis = keypoints[:, KEYPOINTS.index("pelvis")]
    neck = keypoints[:, KEYPOINTS.index("neck")]
    left_hip = keypoints[:, KEYPOINTS.index("left_hip")]
    right_hip = keypoints[:, KEYPOINTS.index("right_hip")]

    up = neck - pelvis
    front = np.cross(left_hip - right_hip, up)
    turn = np.stack([np.cross(up, front), up, front], 1)                             # (M,3,3)
    turn /= np.linalg.norm(turn, axis=-1, keepdims=True)

    turned = rotmat.copy()
    turned[:, 0] = turn @ rotmat[:, 0]
    return keypoints @ turn.swapaxes(1, 2), turned


# ---- 2. Name: posecodes --------------------------------------------------------------------------
#   keypoints (M,35,3) ──measure──► value (M,S) ──thresholds──► category (M,S) ──formulas──► (M,P)
#
# assets/codes.json lists the columns. One row of it,
#
#   {"kind": "angle", "sets": ["s_hip s_knee s_ankle"], "focus": "s_knee", "acc": "all",
#    "rare": ["completely bent"], "abs": ["completely bent", "right angle", "straight"]}
#
# makes two columns: "s_" stands for either side, "o_" for the other one. Thresholds and names of
# the categories depend on the kind. `acc`: what a caption may say; `rare`: what it says first;
# `abs`: what a difference text may demand of pose B. A super-code,
#
#   {"focus": "body", "say": ["kneel_on_left"], "ways": [["onGround left_knee = on_ground",
#    "onGround right_foot = on_ground", "relativePosY left_knee right_knee = below"]]}
#
# holds where all terms of any of its `ways` are true. In a term "*" stands for the joint set, "^"
# for the category that is said; "A" or "B" begins a posecode of one pose of a pair.
PAIR = "(i) "  # begins the category of a paircode
PLURAL = "<plural>"  # the side of two parts that are one thing: "the hands"
RELATIONS = ("distance", "relativePos")  # kinds that relate one part to another
MOST_CATEGORIES = 9  # of one kind


class Code(NamedTuple):
    """One statement: Code("left", "hand", "above", "right", "hand"), the left hand is higher.

    side, side2: "left", "right", PLURAL, or "" of parts such as the head. Where a Code stands for
    several others (sections 5 and 6), side may be "both", and side2 "own" or "opposite".
    """

    side: str
    part: str
    category: str
    side2: str = ""
    part2: str = ""


def side_part(name):
    """Splits "left_knee" into ("left", "knee"), "torso" into ("", "torso")."""
    side, _, part = name.rpartition("_")
    return side, part


def name_sides(text, side):
    """Writes `side` for s_ and the other side for o_."""
    other = "right" if side == "left" else "left"
    text = re.sub(r"\bs_", f"{side}_", text)
    return re.sub(r"\bo_", f"{other}_", text)


def expand_rows(book, key):
    """The rows of a list in codes.json, one for each joint set and side (and category to `say`)."""
    for row in book[key]:
        joint_sets = book["near"] if row["sets"] == "near" else row["sets"]
        for joint_set in joint_sets:
            sides = SIDES if "s_" in joint_set else SIDES[:1]
            for side in sides:
                joints = name_sides(joint_set, side)
                focus = name_sides(row.get("focus", ""), side)
                if focus == "first":
                    focus = joints.split()[0]
                for category in row.get("say", [""]):
                    own = {"joints": joints, "focus": focus, "category": category}
                    yield {"kind": "", **row, **own}


def make_code(row, category):
    """The Code of an expanded row for one of its categories."""
    joints = row["joints"].split()
    side, part = side_part(row["focus"] or joints[0])

    # relations name two parts; so do super-codes, which have no kind, unless they have a focus
    is_relation = row["kind"].startswith(RELATIONS) if row["kind"] else not row["focus"]
    if is_relation:
        side2, part2 = side_part(joints[1])
        return Code(side, part, category, side2, part2)
    return Code(side, part, category)


def keypoint_ids(joints):
    """Indices in KEYPOINTS: "left_hip left_knee" -> [1, 4]."""
    return [KEYPOINTS.index(name) for name in joints.split()]


def read_term(text, index):
    """Reads "angle left_hip left_knee left_ankle = slightly bent | straight".

    Returns (column, first, last): true where the category of a column lies from first to last.
    index: of `CodeTable.index_columns`.
    """
    key, wanted = text.split(" = ")
    column, names = index[key]
    wanted = [names.index(name) for name in wanted.split(" | ")]
    assert wanted == list(range(wanted[0], wanted[-1] + 1)), f"not neighbours: {text}"
    return column, wanted[0], wanted[-1]


class CodeTable:
    """The columns and super-codes of posecodes or of paircodes, from assets/codes.json.

    columns: S rows, sorted by kind. names: the categories of each; "" is never said.
    groups: [(kind, joint_sets (n,k)), ...], in the order of the columns.
    thresholds (S,8). noise (S,): the tolerance of a value, metres or degrees.
    caption_priority (S,9): a caption must not say a category (0), may (1), should (2).
    demand_priority (S,9): the same for demands on pose B. Of super-codes: super_..._priority (P,).
    super_codes: P Codes. terms, way_starts, super_starts: see `read_formulas`.
    suppressed: [(p, column, category), ...]: what is not said where super-code p holds.
    """

    def __init__(self, columns, supers, poses=None):
        """columns, supers: lists in codes.json. poses: the table of both poses of a pair."""
        book = load_asset("codes")
        kinds = book["kinds"] | book["pair_kinds"]
        order = list(kinds)
        self.prefix = PAIR if poses else ""
        self.columns = sorted(expand_rows(book, columns), key=lambda row: order.index(row["kind"]))
        self.names = [kinds[row["kind"]]["categories"] for row in self.columns]
        self.groups = []
        for kind, rows in itertools.groupby(self.columns, key=lambda row: row["kind"]):
            self.groups.append((kind, np.array([keypoint_ids(row["joints"]) for row in rows])))

        self.noise = np.array([kinds[row["kind"]]["noise"] for row in self.columns], np.float32)
        # short lists of thresholds end in infinity, which no value exceeds
        self.thresholds = np.full((len(self.columns), MOST_CATEGORIES - 1), np.inf, np.float32)
        for column, row in enumerate(self.columns):
            thresholds = kinds[row["kind"]]["thresholds"]
            self.thresholds[column, :len(thresholds)] = thresholds

        rarity = 1 + self.flags("rare")
        self.caption_priority = self.flags("acc") * rarity
        self.demand_priority = self.flags("abs") * rarity

        supers = list(expand_rows(book, supers))
        super_rarity = np.array([1 + row["rare"] for row in supers], np.int8)
        is_demanded = np.array([row.get("abs", False) for row in supers], np.int8)
        self.super_caption_priority = super_rarity
        self.super_demand_priority = is_demanded * super_rarity
        self.super_codes = [make_code(row, self.prefix + row["category"]) for row in supers]
        self.read_formulas(supers, self.index_columns(poses))
        self.apply_support_rules()

    def flags(self, key):
        """(S,9) int8: 1 for each category that a column lists under `key`."""
        flags = np.zeros((len(self.columns), MOST_CATEGORIES), np.int8)
        for column, row in enumerate(self.columns):
            listed = row.get(key, [])
            for category, name in enumerate(self.names[column]):
                if name and (listed == "all" or name in listed):
                    flags[column, category] = 1
        return flags

    def index_columns(self, poses):
        """What a formula can refer to: {"angle left_hip left_knee left_ankle": (column, names)}.

        Columns are numbered through: our own, then those of pose A, then those of pose B.
        """
        tables = [("", self)]
        if poses:
            tables += [("A ", poses), ("B ", poses)]

        index = {}
        for prefix, table in tables:
            for row, names in zip(table.columns, table.names):
                index[f"{prefix}{row['kind']} {row['joints']}"] = len(index), names
        return index

    def read_formulas(self, supers, index):
        """Reads the formulas of all super-codes into one list of terms (p, column, first, last).

        The terms of one way follow each other, and so do the ways of one super-code: way_starts
        are the first terms of ways, super_starts the first ways of super-codes.
        """
        terms = []
        self.way_starts = []                                                         # (W,)
        self.super_starts = []                                                       # (P,)
        for p, row in enumerate(supers):
            self.super_starts.append(len(self.way_starts))
            for way in row["ways"]:
                self.way_starts.append(len(terms))
                for text in way:
                    text = text.replace("*", row["joints"]).replace("^", row["category"])
                    terms.append((p, *read_term(text, index)))
        self.terms = np.array(terms)                                                 # (T,4)

    def apply_support_rules(self):
        """What feeds a super-code is not said beside it: `s1` never, `s2` not where it holds."""
        never = self.flags("s1")
        sometimes = self.flags("s2")
        self.suppressed = []
        for p, column, first, last in self.terms:
            if column >= len(self.columns):  # of pose A or B, where other rules apply
                continue
            for category in range(first, last + 1):
                if never[column, category]:
                    self.caption_priority[column, category] = 0
                if sometimes[column, category]:
                    self.suppressed.append((p, column, category))

    @functools.cached_property
    def codes(self):
        """codes[column][category] -> Code. Super-codes follow the columns, as in `Codes`."""
        codes = []
        for row, names in zip(self.columns, self.names):
            codes.append([make_code(row, self.prefix + name) for name in names])
        for code in self.super_codes:
            codes.append([None, code])  # category 0: it does not hold
        return codes

    @functools.cached_property
    def entries(self):
        """{Code: [(column, category), ...]}: true where any of these columns has that category."""
        entries = defaultdict(list)
        for column, category in np.argwhere(self.caption_priority + self.demand_priority):
            entries[self.codes[column][category]].append((column, category))
        for column, code in enumerate(self.super_codes, len(self.columns)):
            entries[code] = [(column, 1)]
        return dict(entries)


@functools.cache
def pose_table():
    """The table of posecodes: 271 columns, 150 super-codes."""
    return CodeTable("posecodes", "supers")


@dataclasses.dataclass
class Codes:
    """What is true of M poses, or of M pairs of poses."""

    value: np.ndarray               # (M,S) metres or degrees
    category: np.ndarray            # (M,S+P) its index; of super-codes: 1 where they hold
    low: np.ndarray                 # (M,S+P) the lowest category within the tolerance ...
    high: np.ndarray                # (M,S+P) ... and the highest
    eligibility: np.ndarray         # (M,S+P) 0 must not be said, 1 may, 2 should
    keypoints: np.ndarray = None    # (M,35,3)
    rotmat: np.ndarray = None       # (M,22,3,3)
    body_frame: tuple = None        # of `stand_upright`, if measured there
    target_codes: "Codes" = None    # of pairs: Codes of pose B, with the eligibility of demands


def categorise(value, table):
    """Values (M,S) -> their categories (M,S): how many thresholds each one exceeds."""
    category = np.zeros(value.shape, np.int8)
    for threshold in table.thresholds.T:                                             # (S,)
        category += value > threshold
    return category


def supers_hold(low, high, table):
    """Which super-codes hold, if every column takes the category from low to high that suits them.

    low, high: (M,columns), numbered as in `index_columns`. Returns (M,P) int8.
    """
    _, column, first, last = table.terms.T                                           # (T,) each
    terms = (low[:, column] <= last) & (first <= high[:, column])                    # (M,T)
    # reduceat reduces runs: all terms of each way, then any way of each super-code
    ways = np.logical_and.reduceat(terms, table.way_starts, axis=1)                  # (M,W)
    return np.logical_or.reduceat(ways, table.super_starts, axis=1).astype(np.int8)


def assign_categories(value, table, poses=()):
    """Values (M,S) -> Codes. poses: of pairs, the Codes of A and of B."""
    value = np.nan_to_num(value).astype(np.float32)
    category = categorise(value, table)                                              # (M,S)
    low = categorise(value - table.noise, table)
    high = categorise(value + table.noise, table)

    def with_poses(own, field):
        """What formulas read: our own columns, then those of the poses."""
        blocks = [getattr(codes, field)[:, :codes.value.shape[1]] for codes in poses]
        return np.concatenate([own, *blocks], 1)

    exact = with_poses(category, "category")
    holds = supers_hold(exact, exact, table)                                         # (M,P)
    may_hold = supers_hold(with_poses(low, "low"), with_poses(high, "high"), table)

    eligibility = table.caption_priority[np.arange(value.shape[1]), category]
    for p, column, silent in table.suppressed:
        eligibility[(holds[:, p] == 1) & (category[:, column] == silent), column] = 0

    return Codes(
        value=value,
        category=np.concatenate([category, holds], 1),
        low=np.concatenate([low, np.zeros_like(holds)], 1),
        high=np.concatenate([high, may_hold], 1),
        eligibility=np.concatenate([eligibility, holds * table.super_caption_priority], 1),
    )


def posecodes_at(keypoints, rotmat, frame="world"):
    """Posecodes from keypoints (M,35,3) and local rotations (M,22,3,3). Returns Codes."""
    keypoints = np.asarray(keypoints, np.float32)
    rotmat = np.asarray(rotmat, np.float32)
    body_frame = stand_upright(keypoints, rotmat) if frame == "body" else None

    value = measure_columns(pose_table(), keypoints, rotmat, body_frame)
    codes = assign_categories(value, pose_table())
    return dataclasses.replace(codes, keypoints=keypoints, rotmat=rotmat, body_frame=body_frame)


@functools.cache
def rest_joints():
    """The joints of the free body at rest (22,3), which are SMPL's; everybody is measured on them.

    Not on those of a --body, or a caption would not mean the same to every model.
    """
    return load_body().rest


def posecodes(rotmat, facing=True, frame="world"):
    """The posecodes of M poses, rotmat (M,22,3,3). Returns Codes.

    facing: the people face +z already, as those of `data.World` do. False: turns them there first.
    frame: "world" is PoseScript's, the frame of the room: "above" is nearer to the ceiling. "body"
    is that of the trunk: "above" is nearer to the head, also of a person who lies on the floor.
    """
    if not facing:
        rotmat = face_front(rotmat)
    rotmat = rotmat.detach().float().cpu()
    joints = forward_kinematics(rotmat, rest_joints())                               # (M,22,3)
    return posecodes_at(find_keypoints(joints), rotmat, frame)


# ---- 3. Name: paircodes --------------------------------------------------------------------------
# A paircode is a category of measure(A) - measure(B), which is negative where the measure grows. It
# says how to get from pose A to pose B. Source: PoseFix (Delmas et al. 2023).
@functools.cache
def pair_table():
    """The table of paircodes: 49 columns and the turn of the body, 52 super-codes."""
    return CodeTable("paircodes", "pair_supers", pose_table())


def supporting_codes(pairs, codes, start):
    """Which posecodes (M,S) of one pose of the pairs feed a super-paircode that holds.

    codes: of that pose. start: the number of its first column in formulas, see `index_columns`.
    """
    supports = np.zeros(codes.value.shape, bool)
    for p, column, first, last in pair_table().terms:
        column -= start
        if 0 <= column < supports.shape[1]:
            category = codes.category[:, column]
            holds = pairs.category[:, pairs.value.shape[1] + p] == 1
            supports[:, column] |= holds & (first <= category) & (category <= last)
    return supports


def paircodes_at(a, b, turn):
    """Paircodes from Codes a to Codes b. Returns Codes.

    turn (M,): how far the body turns, degrees about +y.
    """
    table = pair_table()
    value_a = measure_columns(table, a.keypoints, a.rotmat, a.body_frame)            # (M,S-1)
    value_b = measure_columns(table, b.keypoints, b.rotmat, b.body_frame)
    value = np.concatenate([value_a - value_b, turn[:, None]], 1)                    # (M,S)
    pairs = assign_categories(value, table, (a, b))

    # demands on pose B: not what a super-paircode says already
    poses = pose_table()
    width = len(poses.columns)
    demand = poses.demand_priority[np.arange(width), b.category[:, :width]]
    demand[supporting_codes(pairs, b, start=len(table.columns) + width)] = 0
    super_demand = b.category[:, width:] * poses.super_demand_priority
    eligibility = np.concatenate([demand, super_demand], 1)

    pairs.target_codes = dataclasses.replace(b, eligibility=eligibility)
    return pairs


def vertical_turn(a, b):
    """How far the body turns from poses a to b (M,22,3,3): degrees (M,) about +y, + = left."""
    turn = matrix_to_aa(b[:, 0] @ a[:, 0].mT)                                        # (M,3)
    return np.degrees(turn[:, 1].detach().float().cpu().numpy())


def paircodes(a, b, facing=True, frame="world"):
    """The paircodes from poses a to b, rotmat (M,22,3,3) each. Returns Codes with `target_codes`.

    facing, frame: see `posecodes`. If not facing, B may have turned since A; keypoints are still
    compared as if both faced +z.
    """
    if facing:
        turn = vertical_turn(a, b)
    else:
        turn = vertical_turn(face_front(a), face_front(b, like=a))
    return paircodes_at(posecodes(a, facing, frame), posecodes(b, facing, frame), turn)


# ---- 4. Words ------------------------------------------------------------------------------------
# assets/phrases.json has patterns for every category:
#
#   "slightly bent": ["{a} [is|are] slightly bent", "{a} [is|are] almost straight", ...]
#
# {a} and {b} stand for the first and the second part of a code ("the left hand"), {p} for both
# sides of a part ("the hands"), {x} for its left and {y} for its right one. [is|are] is an open
# verb: the form for one thing and the form for several.
OPPOSITE = {
    "at_right": "at_left", "below": "above", "behind": "front",
    "at_left": "at_right", "above": "below", "front": "behind",
}
MIRRORED = {"left": "right", "right": "left", "at_right": "at_left", "at_left": "at_right"}
LIMB_PARTS = {  # from the trunk outwards
    "arm": ("shoulder", "upperarm", "elbow", "forearm", "wrist", "hand"),
    "leg": ("hip", "thigh", "knee", "shin", "ankle", "foot"),
}
LIMB = dict.fromkeys(LIMB_PARTS["arm"], "arm") | dict.fromkeys(LIMB_PARTS["leg"], "leg")
ARTICLES = {"both": "both", "own": "the", "opposite": "the opposite"}  # of sides with a plural
VIEWS = ("front", "right", "back", "left")  # the side that faces the camera, every quarter turn


@functools.cache
def phrases(full=False):
    """assets/phrases.json. full: with what the full captions say instead."""
    book = load_asset("phrases")
    if full:
        for key, changes in book["full"].items():
            book = book | {key: book[key] | changes}
    return book


def patterns(code, full=False):
    """The patterns that say a code."""
    book = phrases(full)
    if code.category.startswith(PAIR):
        name = code.category.removeprefix(PAIR)
        if name in book["difference"]:
            return book["difference"][name]
        # closer and farther: two parts to each other, or one to the torso
        return book["difference plural" if code.side == PLURAL else "difference torso"][name]

    if not code.part2:
        return book["one"][code.category]
    if code.part == code.part2:
        return book["sides"][code.category]
    special = f"{code.part} {code.category} {code.part2}"
    return book["two"].get(special) or book["two"][code.category]


def part_name(side, part):
    """("left", "upperarm") -> "the left upper arm"; ("both", "upperarm") -> "both upper arms"."""
    if side in ARTICLES:
        return f"{ARTICLES[side]} {phrases()['plurals'].get(part, part)}"
    name = phrases()["names"].get(part, part)
    return f"the {side} {name}" if side in SIDES else f"the {name}"


def fill_pattern(pattern, code, modal=""):
    """Names the parts in a pattern; verbs stay open: "the left knee [is|are] straight".

    modal: "should" or "must", for a demand: "the left knee should be straight".
    """
    if modal:
        pattern = pattern.replace("[is|are]", f"{modal} be")
        pattern = re.sub(r"\[\w+\|(\w+)\]", rf"{modal} \1", pattern)
    return pattern.format(
        a=part_name(code.side, code.part),
        b=part_name(code.side2, code.part2),
        x=part_name("left", code.part),
        y=part_name("right", code.part),
        p=part_name("own", code.part),
    )


def conjugate(text, subject=""):
    """Closes the open verbs of a text. subject: if it is not what stands before the first verb."""
    subject = subject or text.partition(" [")[0]
    noun = subject.rpartition(" ")[2]
    is_plural = " and " in subject or noun in phrases()["plurals"].values()
    return re.sub(r"\[(\w+)\|(\w+)\]", r"\2" if is_plural else r"\1", text)


@functools.cache
def mirror_code(code):
    """The code that says of the other side what this one says of its own."""
    return Code(*[MIRRORED.get(word, word) for word in code])


@functools.cache
def parts_in_code(code):
    """The parts that a code names: ((side, part), ...); "the hands" are two."""
    singular = {plural: part for part, plural in phrases()["plurals"].items()}
    found = []
    for side, part in ((code.side, code.part), (code.side2, code.part2)):
        if side == PLURAL:
            found += [("left", singular[part]), ("right", singular[part])]
        elif part:
            found.append((side, part))
    return tuple(found)


@functools.cache
def text_position(code):
    """Where a code stands in a text: trunk, head, arms, legs, each from the top."""
    for region, parts in enumerate(phrases()["regions"].values()):
        if code.part in parts:
            return region, parts.index(code.part)


def write_sentences(lines):
    """Lines -> text, with capitals and full stops. No lines: that there is nothing to say."""
    lines = lines or [phrases()["nothing"]]
    return " ".join(line[0].upper() + line[1:] + "." for line in lines)


def count_tokens(line):
    """Words and marks of a sentence, with its full stop."""
    return len(line.split()) + 1


def add_view(view, text=""):
    """Says first which side of a person a photograph shows: one of VIEWS, or "" for none."""
    return f"Seen from the {view}. {text}".strip() if view else text


def view_in(text):
    """The view that `add_view` put into a text, or ""."""
    for view in VIEWS:
        if add_view(view).lower() in text.lower():
            return view
    return ""


# ---- 5. Say: short captions ----------------------------------------------------------------------
#   Codes ──► {Code: priority} ──choose──► [Code, ...] ──say──► "The left knee is straight. ..."
#
# A sentence says one code, or the same of both sides: "Both knees are straight." The text of a pair
# says *moves*, which are paircodes ("bend the left knee more"), and *demands*, which are posecodes
# of pose B ("the left knee should be straight").
MOST_STATEMENTS = 15
MOST_TOKENS = 90  # words and marks


class Rule(NamedTuple):
    """Where all conditions are said, the targets need not be."""

    conditions: set  # of Codes
    targets: set


def eligible_codes(table, codes, i):
    """What may be said of row i of Codes: {Code: priority}."""
    category = codes.category[i]
    eligibility = codes.eligibility[i]
    eligible = {}
    for column in np.flatnonzero(eligibility):
        eligible[table.codes[column][category[column]]] = int(eligibility[column])
    return eligible


def read_code(text):
    """A code as phrases.json writes it: "left_hand above left_shoulder", "body kneeling"."""
    words = text.split()
    side, part = side_part(words[0])
    if words[-1] not in KEYPOINTS:
        return Code(side, part, " ".join(words[1:]))

    category = " ".join(words[1:-1])
    side2, part2 = side_part(words[-1])
    if side == "right" and part == part2:  # of two sides the left one comes first
        return Code("left", part, OPPOSITE.get(category, category), "right", part)
    return Code(side, part, category, side2, part2)


def read_codes(texts, side):
    """A set of codes, where s_ stands for `side`."""
    return {read_code(name_sides(text, side)) for text in texts}


@functools.cache
def implications(key):
    """The Rules of a list in phrases.json, "implied", "redundant" or "contradicted"."""
    rules = []
    for conditions, *targets in phrases()[key]:
        for side in SIDES:
            rules.append(Rule(read_codes(conditions, side), read_codes(targets, side)))
    return rules


@functools.cache
def exclusion_keys(code):
    """Of two codes that share a key only one is said.

    A hand is said to be near one part of a limb, and to be aligned with one thing.
    """
    is_aligned = code.category.endswith("-aligned")
    if code.part == code.part2 or not (is_aligned or code.category == "close"):
        return set()
    keys = {(code.side, code.part, code.side2, LIMB.get(code.part2, ""))}
    if is_aligned:
        keys.add((code.side, code.part))
    return keys


@functools.cache
def informativeness(code):
    """How much nearer a code brings a guess of the pose, mm; measured on the embedded world."""
    part = PAIR + code.part if code.category.startswith(PAIR) else code.part
    statement = f"{code.part} {code.category}"
    table = phrases()["worth"]
    for key in (f"{statement} {code.part2}", statement, part, code.part):  # the most specific first
        if key in table:
            return table[key]
    return table[""]


def group_sides(chosen):
    """Codes -> one Code per sentence; the same of both sides becomes one, whose side is "both"."""
    units = []
    done = set()
    for code in chosen:
        if code in done:
            continue
        mirrored = mirror_code(code)
        # a pattern with {b} would bring both hands to one knee
        if mirrored != code and mirrored in chosen and "{b}" not in patterns(code)[0]:
            done.add(mirrored)
            code = min(code, mirrored)._replace(side="both")
        units.append(code)
    return units


@functools.cache
def wordings(unit, demand):
    """The sentences that say a code, the shortest first. demand: see `to_text`."""
    is_demand = demand and not unit.category.startswith(PAIR)
    modals = ("should", "must") if is_demand else ("",)
    lines = []
    for pattern in patterns(unit):
        for modal in modals:
            lines.append(conjugate(fill_pattern(pattern, unit, modal)))
    return sorted(lines, key=count_tokens)


def fewest_tokens(chosen, demand):
    """The length of a text of these codes in its shortest words."""
    return sum(count_tokens(wordings(unit, demand)[0]) for unit in group_sides(chosen))


def choose_codes(eligible, rng, demand=False):
    """The codes of one short text, in the order of the text. eligible: {Code: priority}.

    The most informative codes come first: on the embedded world that is 20 mm better than a random
    choice. rng perturbs their order slightly. demand: see `to_text`.
    """
    candidates = set(eligible)
    for rule in implications("implied"):
        if rule.conditions <= candidates:
            candidates -= rule.targets

    score = {}
    for code, priority in eligible.items():
        noise = 0.15 * rng.random() if rng else 0  # up to a sixth
        # priority 2 doubles the worth of a code: e^0.7
        score[code] = math.log(informativeness(code)) + 0.7 * priority + noise

    chosen = []
    taken = set()
    for code in sorted(candidates, key=lambda code: (-score[code], code)):
        keys = exclusion_keys(code)
        if not keys & taken:
            taken |= keys
            chosen.append(code)

    # the least informative ones go
    chosen = chosen[:MOST_STATEMENTS]
    while fewest_tokens(chosen, demand) > MOST_TOKENS:
        chosen.pop()
    return sorted(chosen, key=lambda code: (text_position(code), code))


def names_changed_part(code, changed):
    """Does a code name one of the changed {(side, part), ...}, or a part further down its limb?"""
    for side, part in parts_in_code(code):
        limb = LIMB.get(part, "")
        chain = ["person", "body", "torso", limb, *LIMB_PARTS.get(limb, ())]
        for above in chain[:chain.index(part) + 1]:
            if (side, above) in changed or ("", above) in changed:
                return True
    return False


def demanded_codes(pairs, i, moves):
    """The demands on pose B of pair i, {Code: priority}: they are about what its `moves` change."""
    changed = set()
    for code in moves:
        changed.update(parts_in_code(code))

    eligible = eligible_codes(pose_table(), pairs.target_codes, i)
    return {code: eligible[code] for code in eligible if names_changed_part(code, changed)}


def limbs_in_code(code):
    """The limbs that a code names: {(side, limb), ...}. Trunk and head count as one, ("", "")."""
    return {(side, LIMB.get(part, "")) for side, part in parts_in_code(code)}


def choose_difference_codes(pairs, i, rng):
    """The codes of a short text of pair i: paircodes first, then demands on what they change.

    Where a limb moves far, its slight moves are left out.
    """
    moves = eligible_codes(pair_table(), pairs, i)
    far_limbs = set()
    for code in moves:
        if "slightly" not in code.category:
            far_limbs |= limbs_in_code(code)

    eligible = {}
    for code, priority in moves.items():
        if "slightly" not in code.category or not limbs_in_code(code) & far_limbs:
            # + 6: every move before every demand, which says less about the way to B
            eligible[code] = priority + 6
    return choose_codes(eligible | demanded_codes(pairs, i, moves), rng, demand=True)


def to_text(chosen, rng, demand=False):
    """Codes -> text. rng draws the wording; None takes the shortest.

    If the text is too long, sentences take their shortest form, in random order, until it fits.
    demand: posecodes are demands ("should be straight"), as in a difference text.
    """
    choices = [wordings(unit, demand) for unit in group_sides(chosen)]
    if not rng:
        return write_sentences([choice[0] for choice in choices])

    lines = [choice[rng.integers(len(choice))] for choice in choices]
    for k in rng.permutation(len(lines)):
        if sum(map(count_tokens, lines)) > MOST_TOKENS:
            lines[k] = choices[k][0]
    return write_sentences(lines)


def caption(codes, i, rng):
    """A short caption of pose i of `posecodes`: at most 15 statements, 90 words and marks."""
    return to_text(choose_codes(eligible_codes(pose_table(), codes, i), rng), rng)


def difference(pairs, i, rng):
    """A short text of how to get from pose A to pose B of pair i of `paircodes`; never empty."""
    return to_text(choose_difference_codes(pairs, i, rng), rng, demand=True)


# ---- 6. Say: full captions -----------------------------------------------------------------------
# They say all that is eligible, in sentences that share what they can. Source: PoseScript, PoseFix.
#
#   {Code: priority} ──subsample──► [Code, ...] ──merge──► {unit: Codes}
#                    ──clauses──► [(subject, template), ...] ──group, join──► text
#
# A unit is a Code that stands for one or several: those of both sides, those of a limb. Clauses
# with one template share a sentence ("The left hand and foot are behind the body."), and so do
# clauses with one subject ("The left hand is near the head and behind the body.").
SKIPPED = 0.15  # the published probabilities
MERGED = 0.95
MOST_CLAUSES = 4  # in one sentence
MATES = {"hand": "elbow", "forearm": "upperarm", "foot": "knee", "shin": "thigh"}  # of one limb
MATES |= {mate: part for part, mate in MATES.items()}
PREFIX = re.compile(r"(?:(?:the|both) (?:left |right )?)?")  # subjects begin so
# clauses with one subject need it once: "is near the head and behind the body"
COPULA = re.compile(r"\{a\} (?:\[is\|are\]|is|are|should be|must be) ")


class Chance:
    """One draw per key, so that the same thing is always said in the same words.

    Sentences can only share words that are equal. Without rng it is always the first choice.
    """

    def __init__(self, rng):
        self.rng = rng
        self.draws = {}

    def pick(self, key, choices):
        """One of the choices, by the draw of this key."""
        if key not in self.draws:
            self.draws[key] = self.rng.random() if self.rng else 0.0
        return choices[int(len(choices) * self.draws[key])]


def subsample(eligible, rng):
    """{Code: priority} -> the codes that are said. Priority 1 may be skipped; not everything is."""
    chosen = []
    for code, priority in eligible.items():
        if priority > 1 or rng is None or rng.random() >= SKIPPED:
            chosen.append(code)
    return chosen or list(eligible)


def implied_by_order(chosen):
    """The codes a < c that follow from two others, a < b and b < c."""
    order = {}  # (relation, a, b) -> the code that says it
    for code in chosen:
        if code.category in OPPOSITE:
            first = code.side, code.part
            second = code.side2, code.part2
            order[code.category, first, second] = code
            order[OPPOSITE[code.category], second, first] = code

    implied = set()
    for relation, a, b in order:
        for relation2, b2, c in order:
            if (relation2, b2) == (relation, b) and (relation, a, c) in order:
                implied.add(order[relation, a, c])
    return implied


@functools.cache
def merge_options(code):
    """The units that can say a code: [(unit, the codes it stands for), ...], the widest first."""
    options = {code: {code}}
    mate = MATES.get(code.part)
    mate2 = MATES.get(code.part2)

    # "the forearm" and "the upper arm" make "the arm"
    if mate and code.part == code.part2:
        limb = LIMB[code.part]
        options[code._replace(part=limb, part2=limb)] = {code, code._replace(part=mate, part2=mate)}
    else:
        if mate:
            options[code._replace(part=LIMB[code.part])] = {code, code._replace(part=mate)}
        if mate2:
            options[code._replace(part2=LIMB[code.part2])] = {code, code._replace(part2=mate2)}

    # "the left hand is near the left hip", and the right one: "both hands are near the hips"
    if code.side in SIDES and code.part != code.part2:
        for unit, members in list(options.items()):
            left = unit if code.side == "left" else mirror_code(unit)
            side2 = {"left": "own", "right": "opposite"}.get(left.side2, left.side2)
            mirrored = {mirror_code(member) for member in members}
            options[left._replace(side="both", side2=side2)] = members | mirrored

    known = pose_table().entries.keys() | pair_table().entries.keys()
    options = [(unit, members) for unit, members in options.items() if members <= known]
    return sorted(options, key=lambda option: -len(option[1]))


def pick_unit(code, free, rng):
    """One of the merge_options of a code whose members are all free. Returns (unit, members)."""
    for unit, members in merge_options(code):
        if len(members) == 1:  # the last option: the code alone
            return unit, members
        if members <= free and (rng is None or rng.random() < MERGED):
            return unit, members


def merge_codes(chosen, rng):
    """Codes -> {unit: the codes it stands for}. Units never say more than what was chosen."""
    units = {}
    free = set(chosen)
    for code in chosen:
        if code in free:
            unit, members = pick_unit(code, free, rng)
            units[unit] = members
            free -= members
    return units


def follows_from_others(code, members, rules):
    """Is a code the target of a rule whose conditions are all said by other units?"""
    return any(code in rule.targets and not rule.conditions & members for rule in rules)


def caption_units(codes, i, rng=None):
    """What the full caption of pose i, or text of pair i, says: {unit: the codes it stands for}."""
    if codes.target_codes is None:
        return pose_units(codes, i, rng)
    return pair_units(codes, i, rng)


def pose_units(codes, i, rng):
    """What is eligible, merged, without what follows from the rest."""
    chosen = subsample(eligible_codes(pose_table(), codes, i), rng)
    implied = implied_by_order(chosen)
    units = merge_codes([code for code in chosen if code not in implied], rng)

    rules = []
    for rule in implications("redundant") + implications("contradicted"):
        if rule.conditions <= set(chosen):
            rules.append(rule)

    needed = {}
    for unit, members in units.items():
        if not all(follows_from_others(code, members, rules) for code in members):
            needed[unit] = members
    return needed


def pair_units(pairs, i, rng):
    """Paircodes, and demands on the parts that they change."""
    moves = subsample(eligible_codes(pair_table(), pairs, i), rng)
    units = merge_codes(moves, rng)
    moves = [code for code in moves if code.part != "person"]  # turning round changes no part
    demands = subsample(demanded_codes(pairs, i, moves), rng)
    return units | merge_codes(demands, rng)


@functools.cache
def subject_pattern():
    """Finds a subject, "the left upper arm", or several, "both feet and the left hand"."""
    book = phrases()
    words = {"face", *book["plurals"].values()}
    for parts in book["regions"].values():
        words.update(book["names"].get(part, part) for part in parts)
    part = rf"{PREFIX.pattern}(?:{'|'.join(sorted(words))})\b"
    return re.compile(rf"\b(?=the|both){part}(?:(?:, | and ){part})*")


def split_subject(text):
    """("the left hand", "{a} is bent"), or without a subject ("", "{a}turn left")."""
    match = subject_pattern().search(text)
    subject = match[0] if match else ""
    return subject, text.replace(subject, "{a}", 1)  # of no subject: {a} at the beginning


def copula_of(template):
    """The beginning of a template, "{a} is ", that can be left out in a list; "" if it has none."""
    match = COPULA.match(template)
    return match[0] if match else ""


@functools.cache
def clause_options(unit, modal="", full=True):
    """All that can say a unit: [("the left hand", "{a} [is|are] near the head"), ...]."""
    return [split_subject(fill_pattern(pattern, unit, modal)) for pattern in patterns(unit, full)]


def join_words(words):
    """["the hand", "the foot", "the head"] -> "the hand, the foot and the head"."""
    return " and ".join(", ".join(words).rsplit(", ", 1))


def group_clauses(clauses, rng):
    """Clauses [(subject, template), ...] -> [those of one sentence, ...], in the same order."""
    plurals = {"the " + plural for plural in phrases()["plurals"].values()}
    candidates = defaultdict(list)
    for k, (subject, template) in enumerate(clauses):
        # one subject: clauses with a copula, or clauses with other verbs, or commands
        form = copula_of(template) if template.startswith("{a} ") else None
        candidates[subject, form].append(k)
        # one template; but "the hands and knees are close together" would be another thing
        candidates[template, subject if subject in plurals else ""].append(k)

    candidates = sorted(candidates.values(), key=len, reverse=True)
    if rng:
        rng.shuffle(candidates)

    groups = []
    free = set(range(len(clauses)))
    for candidate in candidates:
        group = [k for k in candidate if k in free][:MOST_CLAUSES]
        if len(group) > 1:
            groups.append(group)
            free -= set(group)
    groups += [[k] for k in free]

    sentences = []
    for group in sorted(groups):
        sentences.append([clauses[k] for k in group])
    return sentences


def join_clauses(group):
    """Clauses with one subject, or with one template -> a sentence."""
    subjects = list(dict.fromkeys(subject for subject, _ in group))
    first, *rest = dict.fromkeys(template for _, template in group)

    # "the left hand and the left foot" -> "the left hand and foot"
    prefix = PREFIX.match(subjects[0])[0]
    if {PREFIX.match(subject)[0] for subject in subjects} == {prefix}:
        subjects[1:] = [subject.removeprefix(prefix) for subject in subjects[1:]]
    subject = join_words(subjects)

    # "the hand is near the head and is bent" -> "the hand is near the head and bent"
    predicates = [first]
    for template in rest:
        predicate = template.removeprefix(copula_of(first) or "{a}").strip()
        predicates.append(predicate.replace("{a}", "[it|them]"))

    text = join_words(predicates).replace("{a}", subject)
    return conjugate(text, subject)


def full_caption(codes, i, rng=None):
    """The full caption of pose i, or text of pair i. codes: of `posecodes` or `paircodes`.

    rng: np.random.Generator that decides what is skipped, merged and grouped, the words and the
    order. None: one text per pose, the most complete: nothing is skipped, everything merged, and
    every phrase is the first of its list.
    """
    units = caption_units(codes, i, rng)
    order = [0, *(1 + rng.permutation(3))] if rng else [0, 1, 2, 3]  # of regions: the trunk first

    chance = Chance(rng)
    modals = {}
    for unit in units:
        is_demand = codes.target_codes is not None and not unit.category.startswith(PAIR)
        modals[unit] = chance.pick("modal", ["should", "must"]) if is_demand else ""

    def position(unit):
        region, place = text_position(unit)
        return modals[unit], order[region], place, unit

    clauses = []
    for unit in sorted(units, key=position):
        clauses.append(chance.pick(unit.category, clause_options(unit, modals[unit])))
    return write_sentences([join_clauses(group) for group in group_clauses(clauses, rng)])


def full_captions(poses, seed=0, deterministic=False, frame="world", chunk=1000):
    """Full captions of a stream of poses (22,3,3), one by one; `chunk` of them are held in memory.

    Caption i is a function of (pose i, seed, i), or of the pose alone if deterministic.
    frame: see `posecodes`.
    """
    poses = iter(poses)
    start = 0
    while rows := list(itertools.islice(poses, chunk)):
        codes = posecodes(torch.stack(rows), facing=False, frame=frame)
        for k in range(len(rows)):
            rng = None if deterministic else np.random.default_rng((seed, start + k))
            yield full_caption(codes, k, rng)
        start += len(rows)


# ---- 7. Read back --------------------------------------------------------------------------------
# Codes, units and patterns are few enough to write every clause of all captions down once. Reading
# a sentence means to undo `join_clauses` and to look its clauses up.
def every_clause():
    """Yields (subject, template, the codes that it says) for short and full captions."""
    for code in (*pose_table().entries, *pair_table().entries):
        for unit, members in merge_options(code):
            for modal, full in itertools.product(("", "should", "must"), (False, True)):
                for subject, template in clause_options(unit, modal, full):
                    yield subject, template, members

    # sentences that claim nothing about the joints
    yield "", "{a}" + phrases()["nothing"], set()
    for view in VIEWS:
        yield "", "{a}" + add_view(view).lower().rstrip("."), set()


@functools.cache
def sentence_index():
    """{(subject, template): the codes that it says}, with verbs for one thing and for several."""
    index = {}
    for subject, template, members in every_clause():
        for noun in ("hand", "hands"):
            key = subject, conjugate(template, noun)
            assert index.get(key, members) == members, f"{key} has two meanings"
            index[key] = members
    return index


def look_up(subject, templates):
    """The codes of the first of these templates that is known with a subject, or None."""
    index = sentence_index()
    for template in templates:
        if (subject, template) in index:
            return index[subject, template]
    return None


@functools.lru_cache(1 << 16)
def parse_sentence(line):
    """A line of `split_sentences` -> the codes that it says, or None outside the grammar."""
    subject, template = split_subject(line)
    first, *rest = re.split(", | and ", template)

    # what each predicate may have been before `join_clauses`
    predicates = [[first]]
    for piece in rest:
        predicates.append([
            re.sub(r"\b(it|them)\b", "{a}", piece),  # "raise the left hand and shift it far left"
            "{a} " + piece,                          # "... touches the floor and crosses the body"
            "{a}" + piece,                           # "turn left and lean far back"
            copula_of(first) + piece,                # "... is near the head and behind the body"
        ])

    found = []
    for name in re.split(", | and ", subject):
        if not PREFIX.match(name)[0]:
            name = PREFIX.match(subject)[0] + name
        for templates in predicates:
            members = look_up(name, templates)
            if members is None:
                return None
            found += sorted(members)
    return tuple(found)


def split_sentences(text):
    """Text -> its sentences in lower case, with single spaces and no marks but commas."""
    # a language model writes in any case, and may put spaces before its marks
    lines = []
    for piece in re.split(r"[.!?;\n]+", text.lower().replace(" ,", ",")):
        line = " ".join(re.findall(r"\w+,?", piece))
        if line:
            lines.append(line)
    return lines


def statements(text):
    """Text -> the codes that it says. Sentences outside the grammar are skipped."""
    found = []
    for line in split_sentences(text):
        found += parse_sentence(line) or ()
    return found


def is_true(code, codes, i):
    """Is a code true of row i of Codes? Returns (within the tolerance, exactly).

    i: one row, or a slice of rows, of each of which is answered: bool (M,).
    """
    table = pose_table()
    if code.category.startswith(PAIR):
        if codes.target_codes is None:  # "raise the hand" is not true of a single pose
            return False, False
        table = pair_table()
    elif codes.target_codes is not None:  # a demand is about pose B
        codes = codes.target_codes

    within = False
    exactly = False
    for column, category in table.entries[code]:
        low = codes.low[i, column]
        high = codes.high[i, column]
        within |= (low <= category) & (category <= high)
        exactly |= codes.category[i, column] == category
    return within, exactly


def check_statements(text, codes, i):
    """Checks each statement of a text against row i of Codes, of poses or of pairs.

    Returns [(within the tolerance, exactly), ...]. A sentence outside the grammar counts as one
    false statement.
    """
    verdicts = []
    for line in split_sentences(text):
        found = parse_sentence(line)
        if found is None:
            verdicts.append((False, False))
        else:
            verdicts += [is_true(code, codes, i) for code in found]
    return verdicts


def check_text(text, rotmat, source=None):
    """Checks each statement of a text against one pose (22,3,3), as `check_statements` does.

    source: pose A of a difference text, whose pose B is rotmat.
    """
    if source is None:
        return check_statements(text, posecodes(rotmat[None]), 0)
    return check_statements(text, paircodes(source[None], rotmat[None]), 0)


def share_true(text, poses, source=None):
    """Which share of the statements of a text holds for each of M poses (M,22,3,3) -> (M,).

    source: pose A (22,3,3) of a difference text. Sentences outside the grammar do not count here;
    for a text without statements all shares are 0.
    """
    found = statements(text)
    if not found:
        return np.zeros(len(poses))
    if source is None:
        codes = posecodes(poses)
    else:
        codes = paircodes(source.expand_as(poses), poses)

    n_true = np.zeros(len(poses))
    for code in found:
        within, _ = is_true(code, codes, slice(None))
        n_true += within
    return n_true / len(found)


def caption_words():
    """Every word that short captions and short difference texts can say."""
    words = set(phrases()["nothing"].split())
    for code in (*pose_table().entries, *pair_table().entries):
        for chosen in ([code], [code, mirror_code(code)]):
            unit = group_sides(chosen)[0]
            for line in wordings(unit, False) + wordings(unit, True):
                words.update(line.split())
    return words


# ---- 8. Run me -----------------------------------------------------------------------------------
SHOWN = [
    ("angle", "left_hip left_knee left_ankle"),
    ("distance", "left_elbow torso"),
    ("relativePosX", "left_foot right_foot"),
    ("relativePosY", "left_hand right_hand"),
    ("relativeVAxis", "right_shoulder right_elbow"),
    ("relativeRotX", "head neck"),
]
FALSE_SENTENCE = "The left hand is above the neck."


@dataclasses.dataclass
class Config:
    """Measures, names and describes one pose, and checks the description."""

    seed: int = 0  # picks what the captions say, and in which words


def print_checked(text, codes):
    """Prints each statement of a text with its sentence, and whether it is true of the one pose."""
    for line in split_sentences(text):
        for code in parse_sentence(line):
            within, _ = is_true(code, codes, 0)
            words = " ".join(filter(None, code))
            print(f"    {line:<44} {words:<40} {'true' if within else 'FALSE'}")


def main():
    """The lesson of this file on one pose: measure, name, say, read back."""
    config = cli(Config)
    rng = np.random.default_rng(config.seed)
    table = pose_table()
    codes = posecodes(example_pose()[None])

    print(f"measure and name: {len(SHOWN)} of {len(table.columns)} numbers")
    for column, row in enumerate(table.columns):
        if (row["kind"], row["joints"]) in SHOWN:
            unit = "metres" if table.noise[column] < 1 else "degrees"
            value = f"{codes.value[0, column]:7.2f} {unit:<8}"
            name = table.names[column][codes.category[0, column]] or "(no name: never said)"
            print(f"    {row['kind']:<14} {row['joints']:<30} {value} {name}")

    short = caption(codes, 0, rng)
    full = full_caption(codes, 0, rng)
    for title, text in (("say, in short", short), ("say, in full", full)):
        print(f"\n{title}")
        print(textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="    "))

    print("\nread back the short caption, and check it")
    print_checked(short, codes)
    print("\nread another sentence, and check it")
    print_checked(FALSE_SENTENCE, codes)


if __name__ == "__main__":
    run_main(main)
