"""What the model is taught: seven tasks over people, words and pictures that can be made without end.

A pose is measured, the measurements fall into named categories (posecodes), and a caption says some of the categories:

    person (split, i) --activities.json--> pose --measure--> posecodes --choose--> codes --say--> "Both knees bend."
            |                               ^                                        |              |
            +-- edit of it (split, i+1) ----+                                        +- statements -+
            +-- photograph at some heading, in some clothes and light         reads them back, so answers can be marked

A task is a template with slots; a template filled with an example is a list of *segments* (kind, value, is_target) with
kind "text" | "pose" | "image", and that is all the model ever sees of this file. Nothing here has a state: person i is
a function of (split, i), example k of a mixture one of (seed, k).

Letters: M poses, S columns of posecodes, J=22 joints, C angles of a synthetic person, V vertices.

    python data.py                       # one example of each task, and out/world.png: 32 photographs
    python data.py --split test --seed 3
"""
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tokenizer import (
    JOINTS,
    PARENTS,
    Mistake,
    aa_to_matrix,
    body_colors,
    camera,
    cli,
    forward_kinematics,
    load_body,
    matrix_to_aa,
    mirror,
    render,
    saving,
    script,
    turn_y,
)

ASSETS = pathlib.Path(__file__).resolve().parent / "assets"


# ---- 1. Seven tasks and their templates ------------------------------------------------------------------------------
class Task(NamedTuple):
    """What goes in, in order, and what comes out: "pose", "image" or "text"."""
    inputs: tuple
    target: str


TASKS = {                                                  # UniPose table 1: comprehension, generation, editing
    "pose2text": Task(("pose",), "text"),
    "posediff": Task(("pose", "pose"), "text"),
    "image2text": Task(("image",), "text"),
    "imagediff": Task(("image", "image"), "text"),
    "text2pose": Task(("text",), "pose"),
    "image2pose": Task(("image",), "pose"),
    "edit": Task(("pose", "text"), "pose"),
}
SLOT = re.compile(r"(<\w+>)")
TEMPLATES = 200                                            # a task


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
    grammar = json.loads((ASSETS / "instructions.json").read_text())

    def expand(text):
        word = re.search(r"\{(\w+)\}", text)
        if not word:
            text = re.sub(r" ([.,?])", r"\1", " ".join(text.split()))
            return [re.sub(r"(^|[.?] |<caption> )([a-z])", lambda start: start[1] + start[2].upper(), text)]
        return [line for entry in grammar["lists"][word[1]] for line in expand(text.replace(word[0], entry, 1))]

    plain, patterns = grammar["tasks"][task]["plain"], [expand(text) for text in grammar["tasks"][task]["patterns"]]
    turns = itertools.zip_longest(*(np.random.default_rng(0).permutation(lines).tolist() for lines in patterns))
    return tuple(dict.fromkeys([plain, *filter(None, itertools.chain(*turns))]))[:TEMPLATES]


def released(task):
    """The instruction by which the official weights first learnt a task, before they met many phrasings."""
    return json.loads((ASSETS / "instructions.json").read_text())["released"][task]


def fill(task, values, template):
    """A template filled with an example -> segments [(kind, value, is_target)], the answer last.

    values: the task's inputs in order, then its target. The template is cut at its slots before anything is put in, so
    a caption that itself says "<pose>" stays text.
    """
    inputs, target = TASKS[task]
    filled = dict(zip(slots(task), zip(inputs, values)))
    pieces = [filled.get(piece, ("text", piece)) for piece in SLOT.split(template) if piece]
    return [(kind, value, False) for kind, value in pieces] + [(target, values[-1], True)]


# ---- 2. Posecodes ----------------------------------------------------------------------------------------------------
# A posecode puts one measure of a pose (an angle, a distance, a height difference ...) into a named category:
#
#   places (M,35,3) --measure--> value (M,S) --thresholds--> category (M,S) --what may be said--> eligibility (M,S+P)
#
# One flat table, assets/codes.json, holds the S = 271 columns of 13 kinds and P = 150 super-posecodes, and/or formulas
# over them. M poses. Source: PoseScript (Delmas et al. 2022) as released, with its random noise on values left out.
SEGMENTS = {"hand": ("wrist", "middle2"), "thigh": ("hip", "knee"), "shin": ("knee", "ankle"),
            "upperarm": ("shoulder", "elbow"), "forearm": ("elbow", "wrist")}    # virtual places: the middle of two
PLACES = [*JOINTS, "left_middle2", "right_middle2", "left_hand", "right_hand", "torso",
          *(f"{side}_{part}" for part in list(SEGMENTS)[1:] for side in ("left", "right"))]
PAIR = "(i) "                                              # marks the category of a paircode
RELATIONS = ("distance", "relativePos")                    # the kinds that name a second part


def side_part(name):
    """"left_knee" -> ("left", "knee"); "torso" -> ("", "torso")."""
    side, _, part = name.rpartition("_")
    return side, part


def sided(text, side):
    """Writes a side for s_ and the other side for o_ in a text of the tables."""
    names = {"s_": f"{side}_", "o_": "right_" if side == "left" else "left_"}
    return re.sub(r"\b[so]_", lambda found: names[found[0]], text)


def expand(book, key):
    """The rows of a list of the tables, one for every joint set and side."""
    for row in book[key]:
        for joints in book["near"] if row["sets"] == "near" else row["sets"]:
            for side in ("left", "right") if "s_" in joints else ("left",):
                names = sided(joints, side)
                focus = names.split()[0] if row.get("focus") == "first" else sided(row.get("focus", ""), side)
                yield {"kind": "", **row, "joints": names, "focus": focus}


class Table:
    """All columns and super-codes of one family, from assets/codes.json (its `about` explains the lists) to arrays.

    thresholds (S,8), noise (S,); score, absolute (S,9): eligibility of each category in captions, and as a demand on
    pose B; said, asked (P,): the same of supers; column, wanted (P,W,R): super p holds where all terms r of some way w
    do, category[column] == wanted.
    """

    def __init__(self, columns, supers, poses=None):
        """columns, supers: lists of the book. poses: a second Table, which formulas read as "B ..." and "A ..."."""
        book = json.loads((ASSETS / "codes.json").read_text())
        kinds = book["kinds"] | book["pair_kinds"]
        self.mark = PAIR if poses else ""
        self.columns = sorted(expand(book, columns), key=lambda row: list(kinds).index(row["kind"]))
        self.groups = [(kind, np.array([[PLACES.index(place) for place in row["joints"].split()] for row in rows]))
                       for kind, rows in itertools.groupby(self.columns, lambda row: row["kind"])]
        self.names = [kinds[row["kind"]]["categories"] for row in self.columns]
        self.noise = np.float32([kinds[row["kind"]]["noise"] for row in self.columns])
        self.thresholds = np.float32([(kinds[row["kind"]]["thresholds"] + 8 * [np.inf])[:8] for row in self.columns])
        rare = self.flags("rare")
        self.score, self.absolute = self.flags("acc") * (1 + rare), self.flags("abs") * (1 + rare)
        self.read_supers(expand(book, supers), poses)

    def flags(self, key):
        """-> (S,9) int8: 1 where a column lists the category under `key`."""
        return np.int8([[name != "" and (row.get(key) == "all" or name in row.get(key, "")) for name in names]
                        + [0] * (9 - len(names)) for row, names in zip(self.columns, self.names)])

    def read_supers(self, rows, poses):
        """Lays the formulas of the supers out as arrays."""
        index = {f"{row['kind']} {row['joints']}": s for s, row in enumerate(self.columns)}
        names, self.supers, formulas = list(self.names), [], []
        for letter in "BA" if poses else "":               # after our own columns come those of pose B, then of pose A
            index |= {f"{letter} {row['kind']} {row['joints']}": len(names) + s for s, row in enumerate(poses.columns)}
            names += poses.names
        for row, category in ((row, category) for row in rows for category in row["say"]):
            self.supers.append({**row, "code": code_of(row, self.mark + category)})
            formulas.append([way for ways in row["ways"] for way in itertools.product(
                *(read_term(term.replace("*", row["joints"]).replace("^", category), index, names) for term in ways))])
        self.said = np.int8([1 + row["rare"] for row in self.supers])
        self.asked = np.int8([row.get("abs", 0) * (1 + row["rare"]) for row in self.supers])
        wide, deep = max(map(len, formulas)), max(len(way) for ways in formulas for way in ways)
        full = [[(way + way[-1:] * deep)[:deep] for way in (ways + ways[-1:] * wide)[:wide]] for ways in formulas]
        # short ways and short lists of ways repeat their last member: a and a, a or a are a
        self.column, self.wanted = np.moveaxis(np.array(full), -1, 0)                        # (P,W,R) each
        self.silence(formulas)

    def silence(self, formulas):
        """Support rules: what feeds a super-code is not said beside it: never if s1, where the super holds if s2."""
        s1, s2, s = self.flags("s1"), self.flags("s2"), len(self.columns)
        terms = sorted({(p, *term) for p, ways in enumerate(formulas) for way in ways for term in way if term[0] < s})
        self.silencer, self.silenced, self.silenced_at = np.array([term for term in terms if s2[term[1:]]]).T
        for _, *term in terms:
            self.score[tuple(term)] *= 1 - s1[tuple(term)]

    @functools.cached_property
    def codes(self):
        """The code of every category of every column, S lists, then of every super."""
        return [[code_of(row, self.mark + name) for name in names] for row, names in zip(self.columns, self.names)] + [
            [row["code"]] * 9 for row in self.supers]

    @functools.cached_property
    def where(self):
        """code -> [(column, category index), ...]: where to look whether it is true. Supers follow the columns."""
        found, s = {}, len(self.columns)
        for at in zip(*np.nonzero(self.score + self.absolute)):
            found.setdefault(self.codes[at[0]][at[1]], []).append(at)
        return found | {row["code"]: [(s + p, 1)] for p, row in enumerate(self.supers)}


def code_of(row, category):
    """What a row of the tables says by a category: (side1, part1, category, side2, part2), "" where absent."""
    joints = row["joints"].split()
    # of the columns, relations name a second part; of the supers (they have no kind), those without a focus
    second = row["kind"].startswith(RELATIONS) or not row["kind"] and not row["focus"]
    return *side_part(row["focus"] or joints[0]), category, *(side_part(joints[1]) if second else ("", ""))


def read_term(term, index, names):
    """"angle left_hip ... = straight | slightly bent" -> [(column, category index), ...], any of which will do."""
    key, wanted = term.split(" = ")
    return [(index[key], names[index[key]].index(category)) for category in wanted.split(" | ")]


@functools.cache
def pose_table():
    """The table of posecodes: 271 columns, 150 super-posecodes."""
    return Table("posecodes", "supers")


def euler(R):
    """R (...,3,3) = Rz(c) Ry(b) Rx(a) -> (a, b, c) (...,3), degrees."""
    flat = np.hypot(R[..., 2, 1], R[..., 2, 2])
    return np.degrees(np.stack([np.arctan2(R[..., 2, 1], R[..., 2, 2]), np.arctan2(-R[..., 2, 0], flat),
                                np.arctan2(R[..., 1, 0], R[..., 0, 0])], -1))


def face_front(rotmat, like=None):
    """Turns poses (M,22,3,3) about +y to heading 0 - to the heading 0 of the poses `like`, if given.

    The heading is the last Euler angle of AMASS's z-up root, as in PoseScript: the way that the person's left points.
    It jumps by half a turn where someone lies on the side (PoseScript does it too).
    """
    left = (rotmat if like is None else like)[:, 0, :, 0]
    angle = torch.atan2(-left[:, 2], left[:, 0])           # z-up (x, y) is our (x, -z)
    c, s, o = angle.cos(), angle.sin(), torch.zeros_like(angle)
    back = torch.stack([c, o, -s, o, o + 1, o, s, o, c], -1).unflatten(-1, (3, 3))
    return torch.cat([(back @ rotmat[:, 0])[:, None], rotmat[:, 1:]], 1)


def places(joints):
    """joints (M,22,3), or (M,24,3) with the middle of both hands -> the 35 places that codes are read from (M,35,3)."""
    at = dict(zip(PLACES, np.moveaxis(np.asarray(joints, np.float32), 1, 0)))
    for side in ("left", "right"):
        along = at[f"{side}_wrist"] - at[f"{side}_elbow"]
        length = np.maximum(np.linalg.norm(along, axis=-1, keepdims=True), 1e-9)
        at.setdefault(f"{side}_middle2", at[f"{side}_wrist"] + 0.1367 * along / length)  # the hand prolongs the forearm
        for part, (one, two) in SEGMENTS.items():
            at[f"{side}_{part}"] = (at[f"{side}_{one}"] + at[f"{side}_{two}"]) / 2
    at["torso"] = (at["pelvis"] + at["neck"] + at["spine3"]) / 3
    return np.stack([at[name] for name in PLACES], 1)


def angle_between(u, v):
    """Degrees between vectors (...,3). Clipped: rounding must not turn a folded joint (0 degrees) into NaN."""
    size = np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1)
    return np.degrees(np.arccos(np.clip((u * v).sum(-1) / np.maximum(size, 1e-12), -1, 1)))


def body_incline(axis, left, right, pelvis, left_ankle, right_ankle):
    """How the trunk leans forward (X), twists (Y), leans sideways (Z): places (M,1,3) -> degrees (M,1)."""
    up, across = (left + right) / 2 - pelvis, left - right
    if axis == "Y":
        return np.degrees(np.arctan2(across[..., 2], across[..., 0]))
    if axis == "Z":
        return 90 - angle_between(up, np.float32([1, 0, 0]))
    stands = np.minimum(left_ankle, right_ankle)[..., 1] < (up + pelvis)[..., 1] - 0.2
    return np.where(stands, np.degrees(np.arctan2(up[..., 2], up[..., 1])), np.nan)     # upside down: neither way


def head_turn(axis, rotmat, top):
    """Euler angle (M,1), degrees, of the head against its joint `top` (inclusive), rotmat (M,22,3,3)."""
    joint, R = JOINTS.index("head"), rotmat[:, JOINTS.index("head")]
    while joint != top:
        joint = PARENTS[joint]
        R = rotmat[:, joint] @ R
    return euler(R)[:, ["XYZ".index(axis)]]


def measure(kind, sets, at, rotmat):
    """The values (M,S) of one kind, metres or degrees. sets (S,k) of places, at (M,35,3), rotmat (M,22,3,3)."""
    name, axis, (a, *others) = kind.removeprefix("pair_"), kind[-1], (at[:, column] for column in sets.T)    # (M,S,3)
    if name == "angle":
        return angle_between(a - others[0], others[1] - others[0])
    if name == "distance":
        return np.linalg.norm(a - others[0], axis=-1)
    if name == "relativeVAxis":
        tilt = angle_between(a - others[0], np.float32([0, 1, 0]))
        return np.minimum(tilt, 180 - tilt)                # a line has no direction
    if name == "onGround":
        return a[..., 1] - at[..., 1].min(-1, keepdims=True)
    if name.startswith("bodyIncline"):
        return body_incline(axis, a, *others)
    if name.startswith("relativeRot"):
        return head_turn(axis, rotmat, sets[0, 1])
    # what is left is relativePos; a paircode compares a place with itself in the other pose
    return (a if kind.startswith("pair_") else a - others[0])[..., "XYZ".index(axis)]


@dataclasses.dataclass
class Codes:
    """What is true of M poses (or pairs of poses), column by column; row i belongs to pose i."""
    value: np.ndarray                                      # (M,S) metres or degrees
    category: np.ndarray                                   # (M,S+P) index of the category; of supers: 1 if they hold
    low: np.ndarray                                        # (M,S+P) the least category within the tolerance ...
    high: np.ndarray                                       # (M,S+P) ... and the greatest
    eligibility: np.ndarray                                # (M,S+P) 0 must not be said, 1 may, 2 should
    at: np.ndarray = None                                  # (M,35,3) the places
    rotmat: np.ndarray = None                              # (M,22,3,3)
    b: object = None                                       # of pairs: the Codes of pose B, eligibility as demands


def classify(value, table):
    """Values (M,S) -> categories (M,S): the first i with value <= threshold i, else the last."""
    return sum((value > threshold).astype(np.int8) for threshold in table.thresholds.T)


def met(low, high, table):
    """Which supers can hold (M,P) if every column may take any category from low to high (both M, columns)."""
    terms = (low[:, table.column] <= table.wanted) & (table.wanted <= high[:, table.column])    # (M,P,W,R)
    return terms.all(-1).any(-1).astype(np.int8)                                                # (M,P)


def code_up(value, table, others=()):
    """Values (M,S) -> Codes. others: (Codes of pose B, of pose A) where formulas read them."""
    value = np.nan_to_num(value).astype(np.float32)
    low, category, high = (classify(value + sign * table.noise, table) for sign in (-1, 0, 1))

    def all_columns(mine, name):
        return np.concatenate([mine, *(getattr(other, name)[:, :other.value.shape[1]] for other in others)], 1)

    holds = met(*2 * [all_columns(category, "category")], table)
    near = met(all_columns(low, "low"), all_columns(high, "high"), table)
    eligibility = table.score[np.arange(value.shape[1]), category]
    # the support rules that depend on the pose: the super-code speaks for its parts
    row, which = np.nonzero(holds[:, table.silencer] * (category[:, table.silenced] == table.silenced_at))
    eligibility[row, table.silenced[which]] = 0
    return Codes(value, *(np.concatenate(pair, 1) for pair in (
        (category, holds), (low, 0 * holds), (high, near), (eligibility, holds * table.said))))


def posecodes_at(at, rotmat):
    """Posecodes of places (M,35,3), metres, and local rotations (M,22,3,3), both y up and facing +z. -> Codes"""
    at, rotmat, table = np.asarray(at, np.float32), np.asarray(rotmat, np.float32), pose_table()
    codes = code_up(np.concatenate([measure(*group, at, rotmat) for group in table.groups], 1), table)
    codes.at, codes.rotmat = at, rotmat
    return codes


@functools.cache
def rest():
    """The embedded body's joints at rest (22,3): one size for everybody, since the thresholds are metres."""
    return load_body().rest


def posecodes(rotmat, facing=True):
    """All posecodes of M poses, rotmat (M,22,3,3). -> Codes

    facing: the people face +z already, as all of the embedded world do. False: they are turned there first.
    """
    rotmat = (rotmat if facing else face_front(rotmat)).detach().float().cpu()
    return posecodes_at(places(forward_kinematics(rotmat, rest())), rotmat)


# ---- 3. Paircodes ----------------------------------------------------------------------------------------------------
# A paircode puts measure(A) - measure(B) into a category: how to get from pose A to pose B (negative: it grows).
# Source: PoseFix (Delmas et al. 2023).
@functools.cache
def pair_table():
    """The table of paircodes: 49 columns and the turn of the body, 52 super-paircodes."""
    return Table("paircodes", "pair_supers", pose_table())


def helpers(pairs, codes, first):
    """Posecodes that fulfil a super-paircode that holds -> (rows, columns). first: their first column in formulas."""
    table, width = pair_table(), codes.value.shape[1]
    mine = (table.column >= first) & (table.column < first + width)
    column, wanted, holds = table.column[mine] - first, table.wanted[mine], pairs.category[:, len(table.columns):]
    rows, which = np.nonzero(holds[:, np.nonzero(mine)[0]] * (codes.category[:, column] == wanted))
    return rows, column[which]


def paircodes_at(a, b, turn):
    """Paircodes of Codes a -> b and the turn of the body (M,), degrees about +y from A to B. -> Codes, with `.b`"""
    table, poses = pair_table(), pose_table()
    value = [measure(*group, a.at, a.rotmat) - measure(*group, b.at, b.rotmat) for group in table.groups[:-1]]
    pairs = code_up(np.concatenate([*value, turn[:, None]], 1), table, (b, a))
    width = len(poses.columns)
    demand = poses.absolute[np.arange(width), b.category[:, :width]]
    demand[helpers(pairs, b, len(table.columns))] = 0      # what a super-paircode says already
    pairs.b = dataclasses.replace(b, eligibility=np.concatenate([demand, b.category[:, width:] * poses.asked], 1))
    return pairs


def vertical_turn(a, b):
    """How far the body turns about the vertical from poses a to b (M,22,3,3): degrees (M,), + = to the left."""
    return np.degrees(matrix_to_aa(b[:, 0] @ a[:, 0].mT)[:, 1].detach().float().cpu().numpy())


def paircodes(a, b, facing=True):
    """All paircodes from poses a to b, rotmat (M,22,3,3) each. -> Codes; `.b` holds the posecodes of b.

    facing: see `posecodes`. False: B may have turned since A; places are compared as if both faced front.
    """
    turn = vertical_turn(a, b) if facing else vertical_turn(face_front(a), face_front(b, like=a))
    return paircodes_at(posecodes(a, facing), posecodes(b, facing), turn)


# ---- 4. Captions and their inverse -----------------------------------------------------------------------------------
# A text is a list of sentences; a sentence says one code, or the same of both sides. Every sentence that can be said
# stands in one dictionary, so reading is the exact inverse of writing: look the sentence up.
#
#   codes of pose i --choose--> [("left", "knee", "straight", "", ""), ...] --say--> "The left knee is straight. ..."
#                                                                   <--statements--
MOST_STATEMENTS, MOST_TOKENS = 15, 90
LIMB_PARTS = {"arm": ("shoulder", "upperarm", "elbow", "forearm", "wrist", "hand"),
              "leg": ("hip", "thigh", "knee", "shin", "ankle", "foot")}


@functools.cache
def phrases():
    """The words: assets/phrases.json."""
    return json.loads((ASSETS / "phrases.json").read_text())


def patterns(code):
    """The phrase patterns that say a code."""
    book, (side, part, category, _, part2) = phrases(), code
    name = category.removeprefix(PAIR)
    if name != category:
        special = "difference plural" if side == "<plural>" else "difference torso"
        return book["difference"].get(name) or book[special][name]
    if not part2:
        return book["one"][category]
    if part == part2:
        return book["sides"][category]
    return book["two"].get(f"{part} {category} {part2}") or book["two"][category]


def called(side, part):
    """What a part is called: ("left", "upperarm") -> "the left upper arm"; side "both" -> "both upper arms"."""
    name = phrases()["plurals"].get(part) if side == "both" else phrases()["names"].get(part, part)
    return " ".join(word for word in ("" if side == "both" else "the", side.replace("<plural>", ""), name) if word)


def sentence(pattern, code, both=False, modal=""):
    """A pattern filled with a code. both: of the left and the right part at once. modal: "should", "must"."""
    side, part, _, side2, part2 = code
    many = both or side == "<plural>" or "{p}" in pattern
    if modal:                                              # [is|are] -> should be, [touches|touch] -> should touch
        pattern = re.sub(r"\[\w+\|(\w+)\]", lambda verb: f"{modal} {verb[1].replace('are', 'be')}", pattern)
    pattern = re.sub(r"\[(\w+)\|(\w+)\]", lambda verb: verb[2 if many else 1], pattern)
    return pattern.format(a=called("both" if both else side, part), b=called(side2, part2), x=called("left", part),
                          y=called("right", part), p="the " + phrases()["plurals"].get(part, ""))


def twin(code):
    """The code that says of the other side what this one says of its own."""
    other = {"left": "right", "right": "left", "at_right": "at_left", "at_left": "at_right"}
    return tuple(other.get(word, word) for word in code)


@functools.cache
def sayings():
    """-> (ways, meaning). ways: (code, [its twin,] a demand?) -> sentences, shortest first; meaning: back again."""
    ways, meaning, poses = {}, {line: () for line in silent()}, pose_table()
    asked = [*poses.absolute, *poses.asked[:, None].repeat(9, 1)]
    demands = {code for code, found in poses.where.items() if any(asked[s][c] for s, c in found)}
    for code in [*poses.where, *pair_table().where]:
        for pattern, modal in itertools.product(patterns(code), ("", "should", "must") if code in demands else ("",)):
            ways.setdefault((code, modal != ""), []).append(sentence(pattern, code, False, modal))
            if code[0] == "left" and code[1] != code[4] and "{b}" not in pattern:
                ways.setdefault((code, twin(code), modal != ""), []).append(sentence(pattern, code, True, modal))
    for key, lines in ways.items():
        lines.sort(key=tokens)
        for line in lines:                                 # a sentence with two readings would have no inverse
            assert meaning.setdefault(line, key[:-1]) == key[:-1], line
    return ways, meaning


def silent():
    """Sentences of texts that say nothing that joints could show."""
    return [phrases()["nothing"], *(show_side(view).lower().rstrip(".") for view in VIEWS)]


def tokens(line):
    """Words and marks of a sentence, its full stop included."""
    return len(line.split()) + 1


def eligible(table, codes, i):
    """{code: eligibility} of row i: what may be said of it."""
    row, category = codes.eligibility[i], codes.category[i]
    return {table.codes[s][category[s]]: int(row[s]) for s in np.flatnonzero(row)}


@functools.cache
def implications():
    """[(conditions, target)]: where the conditions are said, the target need not be."""
    def code(text):
        words = text.split()
        second = side_part(words.pop()) if words[-1] in PLACES else ("", "")
        return *side_part(words[0]), " ".join(words[1:]), *second

    return [({code(sided(one, side)) for one in conditions}, code(sided(target, side)))
            for conditions, target in phrases()["implied"] for side in ("left", "right")]


def limb(part):
    """The limb of a part, "" for the trunk and the head."""
    return next((name for name, parts in LIMB_PARTS.items() if part in parts), "")


def crowds(code):
    """Keys that only one code of a text may have: a hand is near one part of a limb, aligned with one thing."""
    side, part, category, side2, part2 = code
    aligned = {(side, part)} if category.endswith("-aligned") else set()
    return aligned | {(side, part, side2, limb(part2))} if part != part2 and (aligned or category == "close") else set()


def worth(code):
    """How much a code tells of where the joints are, millimetres: the most specific entry of a measured table."""
    table, (_, part, category, _, part2) = phrases()["worth"], code
    moved = PAIR + part if category.startswith(PAIR) else part
    keys = (f"{part} {category} {part2}", f"{part} {category}", moved, part, "")
    return next(table[key] for key in keys if key in table)


def region(code):
    """Where a code stands in a text: trunk, head, arms, legs, and within these from the top."""
    return next((r, parts.index(code[1])) for r, parts in enumerate(phrases()["regions"].values()) if code[1] in parts)


def grouped(said):
    """Codes -> what each sentence says, in the same order: [(code,) or (left code, right code), ...]."""
    units, done = [], set()
    for code in said:
        if code not in done:
            pair = tuple(sorted((code, twin(code))))       # "left" comes before "right"
            units.append(pair if (*pair, False) in sayings()[0] and set(pair) <= set(said) else (code,))
            done.update(units[-1])
    return units


def select(may, rng, demand=False):
    """{code: eligibility} -> the codes of one text, in order of speech, within its limits. demand: see `say`.

    What tells most of the pose goes first, so a listener may take the rest for the usual: on the embedded world this
    brings a guess 20 mm nearer than a random choice. A little chance on top: two texts of one pose may differ.
    """
    codes, said, crowded = set(may), [], set()
    for conditions, target in implications():
        if conditions <= codes:
            codes.discard(target)
    # eligibility 2 doubles a code's worth (e^0.7), chance changes it by up to a sixth
    score = {code: math.log(worth(code)) + 0.7 * e + 0.15 * rng.random() for code, e in may.items()}
    for code in sorted(codes, key=score.get, reverse=True):
        if not crowds(code) & crowded:
            crowded |= crowds(code)
            said.append(code)
    said = said[:MOST_STATEMENTS]
    # what does not fit in its shortest words goes, the least telling first
    while sum(tokens(spellings(unit, demand)[0]) for unit in grouped(said)) > MOST_TOKENS:
        said.pop()
    return sorted(said, key=lambda code: (region(code), code))


def choose(codes, i, rng):
    """Codes -> the statements of a caption of pose i: [(side1, part1, category, side2, part2), ...] in order."""
    return select(eligible(pose_table(), codes, i), rng)


def parts_named(code):
    """The parts that a code names, one side at a time: [(side, part), ...]."""
    single = {many: one for one, many in phrases()["plurals"].items()}
    return [(side, single.get(part, part)) for own, part in (code[:2], code[3:]) if part
            for side in (("left", "right") if own == "<plural>" else (own,))]


def touched(code, changed):
    """Does a code name one of the changed (side, part), or a part further down its limb?"""
    for side, part in parts_named(code):
        line = ("person", "body", "torso", limb(part), *LIMB_PARTS.get(limb(part), ()))
        if changed & {(own, above) for above in line[:line.index(part) + 1] for own in ("", side)}:
            return True
    return False


def choose_difference(pairs, i, rng):
    """Codes of pairs -> the statements of a difference text: paircodes first, then demands on what changed."""
    moves = eligible(pair_table(), pairs, i)
    changed = {part for code in moves for part in parts_named(code)}
    ends = {code: e for code, e in eligible(pose_table(), pairs.b, i).items() if touched(code, changed)}
    # + 6: every move goes before every demand; where B ends up says less than which way things go
    return select({code: e + 6 for code, e in moves.items()} | ends, rng, demand=True)


def spellings(unit, demand):
    """The sentences for one or two codes, the shortest first. demand: see `say`."""
    return sayings()[0][(*unit, demand and not unit[0][2].startswith(PAIR))]


def say(said, rng, demand=False):
    """Statements -> text. demand: posecodes are asked for ("should be straight"), as in a difference text.

    Phrases are drawn at random; a text over its limit gets the shortest phrase for one sentence after the other.
    """
    choices = [spellings(unit, demand) for unit in grouped(said)]
    lines = [choice[rng.integers(len(choice))] for choice in choices]
    for k in rng.permutation(len(lines)):
        if sum(map(tokens, lines)) > MOST_TOKENS:
            lines[k] = choices[k][0]
    return " ".join(line[0].upper() + line[1:] + "." for line in lines or [phrases()["nothing"]])


def caption(codes, i, rng):
    """Pose i in words. codes: of `posecodes`; rng: np.random.Generator. -> at most 15 statements, 90 words and marks"""
    return say(choose(codes, i, rng), rng)


def difference(pairs, i, rng):
    """How to get from pose A to pose B of pair i, in words; never empty. pairs: of `paircodes`."""
    return say(choose_difference(pairs, i, rng), rng, demand=True)


def sentences(text):
    """Text -> its sentences as `sayings` spells them: lower case, single spaces, no marks."""
    # a language model's text may be in any case and have spaces before its full stops
    pieces = re.split(r"[.!?;\n]+", text.lower())
    return [line for line in (" ".join(re.findall(r"\w+", piece)) for piece in pieces) if line]


def statements(text):
    """Text -> the codes that it says, exactly as they were chosen; sentences outside the grammar are skipped."""
    return [code for line in sentences(text) for code in sayings()[1].get(line, ())]


def holds(code, codes, i):
    """Is a code true of row i? -> (within the tolerance, exactly)."""
    if code[2].startswith(PAIR):
        table = pair_table()
    else:
        table, codes = pose_table(), codes.b or codes      # a demand is about pose B
    if codes.value.shape[1] != len(table.columns):         # "raise the hand" says nothing true of a single pose
        return False, False
    low, category, high = codes.low[i], codes.category[i], codes.high[i]
    return (any(low[s] <= c <= high[s] for s, c in table.where[code]),
            any(category[s] == c for s, c in table.where[code]))


def verdicts(text, codes, i):
    """Each statement of a text against row i of Codes (of poses or pairs): [(within the tolerance, exactly), ...].

    A sentence outside the grammar counts as one statement that does not hold.
    """
    meaning = sayings()[1]
    return [verdict for line in sentences(text)
            for verdict in ([holds(code, codes, i) for code in meaning[line]] if line in meaning else [(False, False)])]


def check(text, rotmat, source=None):
    """Each statement of a text against a pose (22,3,3): [(within the tolerance, exactly), ...].

    source: pose A of a difference text, whose pose B is rotmat. Many at once: `verdicts` on codes made beforehand.
    """
    return verdicts(text, posecodes(rotmat[None]) if source is None else paircodes(source[None], rotmat[None]), 0)


def caption_words():
    """Every word that the two grammars can say."""
    return {word for line in sayings()[1] for word in line.split()}


# ---- 5. Synthetic people ---------------------------------------------------------------------------------------------
LEGS_ARMS = ["left_leg", "right_leg", "left_arm", "right_arm"]
PARTS = ["root", "trunk", "head", *LEGS_ARMS]
CHANGE = np.array([0, 2, 0, 2, 0, 1, 1])                   # tickets in a lottery; the right leg carries and stays
FEWER = [0.10, 0.40]                                       # share of edits of one part; of one or two (the rest: three)
STILL = [JOINTS.index(f"{side}_{part}") for side in ("left", "right") for part in ("collar", "foot", "wrist")]


def uniform(rows, n):
    """Row numbers (M,) -> (M,n) numbers in [0,1): a pure function of (row, column), by splitmix64.

    A hash of the counter, not a stream: a row stays what it is whatever else is drawn, and all rows are done at once.
    """
    z = np.asarray(rows, np.uint64)[:, None] * np.uint64(1 << 16) + np.arange(1, n + 1, dtype=np.uint64)
    z = z * np.uint64(0x9E3779B97F4A7C15)                  # arrays of unsigned numbers wrap around, as they should
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / float(1 << 53)


class People:
    """assets/activities.json as arrays. A person is C angles in degrees, named and limited as the table says.

    An activity holds ranges of root, trunk and head, and for every limb a list of gestures to choose from; a gesture
    is a range for each angle of one limb. fresh, edited: what a person, or an edit of one, draws from.
    """

    def __init__(self):
        table = json.loads((ASSETS / "activities.json").read_text())
        self.gestures, self.sets = {"leg": table["legs"], "arm": table["arms"]}, table["sets"]
        limits = {part: table["limits"][part.split("_")[-1]] for part in PARTS}
        self.angles = [(part, angle) for part in PARTS for angle in limits[part]]
        self.limits = np.array([limits[part][angle] for part, angle in self.angles], np.float64)     # (C,2)
        self.owner = np.array([PARTS.index(part) for part, _ in self.angles])                             # (C,)
        self.turns = self.read_turns(table["axes"])
        rows = {name: {**table["usual"], **row} for name, row in table["activities"].items()}
        self.activities = list(rows)
        often = np.cumsum([row.get("often", 1.0) for row in rows.values()])
        self.shares = often / often[-1]                                                      # (A,) cumulated
        self.fresh = self.options(rows.values(), ["trunk", *LEGS_ARMS])
        self.edited = self.options(rows.values(), ["edit_trunk", "edit_legs", "edit_legs", "edit_arms", "edit_arms"])

    def at(self, angle, parts=PARTS):
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
        for c in np.flatnonzero(self.owner == PARTS.index(part)):
            out[:, c] = ranges.get(self.angles[c][1], np.nan if self.angles[c][1] == "point" else 0)
        return out

    def options(self, rows, keys):
        """-> ranges of root, trunk and head (A,2,C), of the limbs' gestures (A,4,O,2,C), how many of these (A,4)."""
        body, limbs = [], []
        for row in rows:
            body.append(sum(self.span(*pair) for pair in zip(PARTS, [row.get("root", {}), row[keys[0]], row["head"]])))
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
        own = np.eye(len(PARTS))[self.owner]                                                      # (C,7)
        # of two drafts of every part the one that moves more: an edit should be seen
        pick = [np.nan_to_num(np.abs(draft - angles)) @ own for draft in (near, far)]        # (M,7)
        target = np.where((pick[1] > pick[0])[:, self.owner], far, near)
        tickets = u[:, :7] ** (1 / np.maximum(CHANGE, 1e-3))                                 # a lottery with weights
        changed = tickets.argsort(1).argsort(1) >= 6 - (u[:, 7:8] > FEWER).sum(1, keepdims=True)
        changed[:, PARTS.index("head")] = u[:, 8] < 0.4
        return np.where(changed[:, self.owner], target, angles)

    def settle(self, angles):
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
        third[:, STILL] = torch.tensor(np.radians(still)).float().unflatten(1, (6, 3))
        return aa_to_matrix(first) @ aa_to_matrix(second) @ aa_to_matrix(third)              # (M,22,3,3)


people = functools.cache(People)                           # the tables are read once
SPLITS = {"train": 0, "val": 1 << 20, "test": 2 << 20}     # where a split starts among all people: they never meet
UNIFORMS = 96                                              # random numbers a row may use
VIEWS = ("front", "right", "back", "left")                 # the side turned to the camera, one for each quarter turn
SEEN = (0.7, 0.8, 0.9)                                     # their shares, cumulated; the last takes what is left


def populate(split, n):
    """The first n people of a split (n even) -> activity indices (n,), rotmat (n,22,3,3), headings (n,) radians.

    Rows 2i and 2i+1 are a pair: the second is an edit of the first. Half of the pairs are mirrored. Raises Mistake.
    """
    if split not in SPLITS or not 2 <= n <= 1 << 20 or n % 2:
        raise Mistake(f"no {n} people in split {split!r}: the splits are {', '.join(SPLITS)}, and people come in pairs")
    crowd, u = people(), uniform(SPLITS[split] + np.arange(n), UNIFORMS)
    wide, one, two = 4 + len(crowd.angles), u[0::2, 4:], u[1::2, 4:]
    activity = np.searchsorted(crowd.shares, u[0::2, 0], side="right")
    drawn = crowd.draw(crowd.fresh, activity, one[:, :wide]) + 4 * one[:, wide:2 * wide - 4] - 2    # noise: 2 degrees
    angles = np.stack([drawn, crowd.edit(drawn, activity, two[:, :9 + 2 * wide])], 1).reshape(n, -1)
    rotmat = crowd.rotations(crowd.settle(angles), (6 * one[:, -18:] - 3).repeat(2, 0))
    flipped = torch.tensor(u[0::2, 1] < 0.5).repeat_interleave(2)
    rotmat[flipped] = mirror(rotmat[flipped])
    view = np.searchsorted(SEEN, u[:, 2], side="right")    # most face the camera
    headings = view * math.pi / 2 + (2 * u[:, 3] - 1) * math.radians(35)
    return activity.repeat(2), rotmat, (headings + math.pi) % (2 * math.pi) - math.pi


# ---- 6. Photographs --------------------------------------------------------------------------------------------------
sitter = functools.cache(load_body)                        # who stands before the camera


def muted(rng, low, high):
    """A random colour (3,) in 0..1: a grey between low and high, and some tint."""
    return (rng.uniform(low, high) + rng.uniform(-0.16, 0.16, 3)).clip(0, 1)


def dress(rng):
    """Random clothes for `body_colors`. Hair stays dark and skin lighter, so that front and back can be told apart."""
    return {"skin": np.array([0.93, 0.76, 0.64]) * rng.uniform(0.65, 1.05), "hair": rng.uniform(0.02, 0.14, 3),
            "shirt": muted(rng, 0.15, 0.9), "trousers": muted(rng, 0.1, 0.75), "shoes": muted(rng, 0.05, 0.35)}


def backdrop(rng, size):
    """A random background (size,size,3) uint8: plain, a gradient, soft noise, or a wall that meets the floor."""
    across, down = np.meshgrid(*2 * [np.linspace(0, 1, size)])
    way, cloud = rng.uniform(-1, 1, 2), Image.fromarray(rng.integers(0, 256, (7, 7), dtype=np.uint8))
    weight = [lambda: 0 * down,
              lambda: (0.5 + (across - 0.5) * way[0] + (down - 0.5) * way[1]).clip(0, 1),
              lambda: np.asarray(cloud.resize((size, size), Image.BICUBIC)) / 255,
              lambda: down > 0.68 + 0.15 * way[0]][rng.integers(4)]()
    one, two = muted(rng, 0.35, 0.95), muted(rng, 0.35, 0.95)
    return (255 * (one + weight[..., None] * (two - one))).astype(np.uint8)


def photograph(rotmat, size, look, rng):
    """One person as the camera sees it: rotmat (22,3,3) -> picture (size,size,3) uint8, where its joints are (22,2) in
    pixels. look: generator of clothes, rng: of the rest: lamp, exposure, what stands behind, how large and where."""
    body, zoom, lamp = sitter(), rng.uniform(0.75, 1.0), rng.normal(size=3) * [1, 0.7, 0.5] + [0, 0.6, 0.8]
    joints, vertices = (points[0].numpy() for points in body(rotmat[None]))
    colors = body_colors(body, 0, **dress(look)) * rng.uniform(0.75, 1.15)
    shift = rng.uniform(-0.5, 0.5, 2) * (1.0 - 0.92 * zoom)  # what is not filled is room to stand elsewhere
    picture = render(vertices, body.faces, colors.clip(0, 1), size, background=backdrop(rng, size), zoom=zoom,
                     shift=shift, floor=rng.random() < 0.7, light=lamp / np.linalg.norm(lamp))
    return picture, camera(joints, vertices, size, zoom, shift)[0]


def show_side(view, text=""):
    """A caption that first says which side of the person a photograph shows; view: one of VIEWS, or "" for none."""
    return f"Seen from the {view}. {text}".strip() if view else text


def side_shown(text):
    """The view that `show_side` put into a text, "" where there is none."""
    return next((view for view in VIEWS if show_side(view).lower() in text.lower()), "")


# ---- 7. World and Mixture --------------------------------------------------------------------------------------------
class World:
    """The embedded data set: n people of a split, in pairs, with everything that can be asked about them.

    poses (n,22,3,3) facing +z, seen (n,22,3,3) the same in the camera's frame, headings (n,) radians, activity: list of
    n names. Rows 2i and 2i+1 are a pair. Row i is a pure function of (split, i), whatever n is. Raises Mistake.
    """

    def __init__(self, split="train", n=2000, size=128):
        self.split, self.size = split, size
        activity, self.poses, self.headings = populate(split, n)
        self.activity, self.seen = [people().activities[a] for a in activity], self.poses.clone()
        self.seen[:, 0] = torch.tensor(np.stack([*map(turn_y, self.headings)])).float() @ self.poses[:, 0]

    def photo(self, i):
        """The photograph of person i (size,size,3) uint8, and where its joints are (22,2), pixels, x to the right.

        The two of a pair wear the same clothes."""
        row = SPLITS[self.split] + int(i)
        return photograph(self.seen[i], self.size, *map(np.random.default_rng, [(row // 2, 1), (row, 2)]))

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
        up = F.normalize(forward_kinematics(self.poses, rest())[:, JOINTS.index("neck")], dim=-1)[:, 1]
        sides = np.round(self.headings / (math.pi / 2)).astype(int) % 4
        return [VIEWS[side] if straight > 0.7 else "" for side, straight in zip(sides, up)]

    def scene(self, i):
        """The coarse caption of a photograph: "tree pose, seen from the left"."""
        return ", ".join(filter(None, [self.activity[i], show_side(self.views[i])])).lower().rstrip(".")

    def caption(self, i, rng):
        """What person i does, in words; rng chooses what is said and how."""
        return caption(self.codes, i, rng)

    def sight(self, i, rng):
        """The same of the photograph: from which side it shows the person, if that can be said, comes first."""
        return show_side(self.views[i], self.caption(i, rng))

    def request(self, i, rng):
        """The same as somebody would type it: mostly whole, else the activity's name, a few statements, or both."""
        if rng.random() < 0.7:
            return self.caption(i, rng)
        said = [code for code in choose(self.codes, i, rng) if rng.random() < 0.4]
        named = self.activity[i] + "." if i % 2 == 0 and rng.random() < 0.7 else ""    # an edit may be something else
        return " ".join(filter(None, [named[:1].upper() + named[1:], said and say(said, rng)])) or self.caption(i, rng)

    def difference(self, i, j, rng):
        """How to get from person i to person j, the two of a pair, in words."""
        assert i ^ j == 1, f"{i} and {j} are not a pair"
        return difference(self.pairs[i % 2], i // 2, rng)


class Mixture:
    """Endless examples of some tasks: [k] -> (task, segments), a pure function of (seed, k), tasks evenly mixed.

    pose, seen, image: anything indexed by row that stands in for world.poses, world.seen and world.image, such as pose
    ids or features computed once. templates: how many of the 200 instructions are used (1: the plain one).
    photos: image tasks ask about the first so many people only (0: all).
    """

    def __init__(self, tasks, seed, world, pose=None, seen=None, image=None, templates=TEMPLATES, photos=0):
        self.tasks, self.seed, self.world, self.templates = list(tasks), seed, world, templates
        self.photos = photos or len(world.poses)
        self.pose = world.poses if pose is None else pose
        self.seen = world.seen if seen is None else seen
        self.photo = world.image if image is None else image.__getitem__

    def __getitem__(self, k):
        rng = np.random.default_rng((self.seed, k))
        task = self.tasks[rng.integers(len(self.tasks))]
        people = self.photos if "image" in TASKS[task].inputs else len(self.world.poses)
        i, line = int(rng.integers(people)), templates(task)[rng.integers(self.templates)]
        return task, fill(task, self.example(task, i, rng), line)

    def example(self, task, i, rng):
        """One example: a task's inputs in order, then its target. Pairs run from person i to its partner."""
        j = i ^ 1
        if task in ("posediff", "imagediff"):
            look = self.pose.__getitem__ if task == "posediff" else self.photo
            return look(i), look(j), self.world.difference(i, j, rng)
        if task == "edit":
            return self.pose[i], self.world.difference(i, j, rng), self.pose[j]
        if task == "image2pose":                           # answered in the camera's frame
            return self.photo(i), self.seen[i]
        if task == "text2pose":
            return self.world.request(i, rng), self.pose[i]
        if task == "image2text":
            return self.photo(i), self.world.sight(i, rng)
        return self.pose[i], self.world.caption(i, rng)


def words():
    """Sorted list of every word and mark, in lower case, that templates and captions can say."""
    said = " ".join(SLOT.sub(" ", line) for task in TASKS for line in templates(task))
    said = " ".join([said, *map(show_side, VIEWS), *people().activities])
    return sorted(set(re.findall(r"[^\s.,?]+|[.,?]", said.lower())) | set(caption_words()))


# ---- 8. Run it: one example of each task -----------------------------------------------------------------------------
@dataclass
class Config:
    """Print one example of each task and draw 32 people."""
    split: str = "train"                                   # train | val | test
    seed: int = 0                                          # which examples
    out: str = "out/world.png"                             # where the photographs of the first 32 people go


def main():
    """Prints one example of each task and saves a sheet of photographs."""
    config = cli(Config)
    world = World(config.split, 64)
    for task in TASKS:
        print(f"\n{task}")
        for kind, value, is_target in Mixture([task], config.seed, world)[0][1]:
            shown = value.strip() if kind == "text" else f"<{kind}> {' x '.join(map(str, value.shape))}"
            print(f"  {'->' if is_target else '  '} {shown}")
    rows = [np.concatenate([world.image(i) for i in range(k, k + 8)], 1) for k in range(0, 32, 8)]
    with saving(config.out) as path:
        Image.fromarray(np.concatenate(rows)).save(path, format="PNG")
    joints = forward_kinematics(World(config.split, 4000).poses, rest())
    apart = 1000 * (joints[0::2] - joints[1::2]).norm(dim=-1).mean()
    print(f"\n{len(people().activities)} activities, {len(words())} words, {len(TASKS)} x {TEMPLATES} instructions; "
          f"the two of a pair are {apart:.0f} mm apart (mean over 2,000 pairs); the first 32 people: {config.out}")


if __name__ == "__main__":
    script(main)
