"""Measure, name, say, read back: why a caption can be checked.

    python captions.py
"""
import dataclasses
import functools
import itertools
import math
import re
from collections import defaultdict

import numpy as np
import torch

from tokenizer import (
    JOINTS, PARENTS, cli, example_pose, face_front, forward_kinematics, load_asset, load_body,
    matrix_to_aa, run_main,
)


# ---- 1. Posecodes --------------------------------------------------------------------------------
# A posecode puts one measure of a pose (an angle, a distance, a height difference ...) into a named category:
#
#   places (M,35,3) --measure--> value (M,S) --thresholds--> category (M,S) --what may be said--> eligibility (M,S+P)
#
# One flat table, assets/codes.json, holds the S = 271 columns of 13 kinds and P = 150 super-posecodes, and/or formulas
# over them. M poses. Source: PoseScript (Delmas et al. 2022) as released, with its random noise on values left out.
LIMB_SEGMENTS = {"hand": ("wrist", "middle2"), "thigh": ("hip", "knee"), "shin": ("knee", "ankle"),
            "upperarm": ("shoulder", "elbow"), "forearm": ("elbow", "wrist")}    # virtual places: the middle of two
KEYPOINTS = [*JOINTS, "left_middle2", "right_middle2", "left_hand", "right_hand", "torso",
          *(f"{side}_{part}" for part in list(LIMB_SEGMENTS)[1:] for side in ("left", "right"))]
PAIR = "(i) "                                              # marks the category of a paircode
RELATIONS = ("distance", "relativePos")                    # the kinds that name a second part
FLOOR = ("relativeVAxis", "onGround", "bodyInclineX", "bodyInclineZ")    # the kinds that have to do with the floor


def side_part(name):
    """"left_knee" -> ("left", "knee"); "torso" -> ("", "torso")."""
    side, _, part = name.rpartition("_")
    return side, part


def sided(text, side):
    """Writes a side for s_ and the other side for o_ in a text of the tables."""
    names = {"s_": f"{side}_", "o_": "right_" if side == "left" else "left_"}
    return re.sub(r"\b[so]_", lambda found: names[found[0]], text)


def expand_rows(book, key):
    """The rows of a list of the tables, one for every joint set and side."""
    for row in book[key]:
        for joints in book["near"] if row["sets"] == "near" else row["sets"]:
            for side in ("left", "right") if "s_" in joints else ("left",):
                names = sided(joints, side)
                focus = names.split()[0] if row.get("focus") == "first" else sided(row.get("focus", ""), side)
                yield {"kind": "", **row, "joints": names, "focus": focus}


class CodeTable:
    """All columns and super-codes of one family, from assets/codes.json (its `about` explains the lists) to arrays.

    thresholds (S,8), noise (S,); score, absolute (S,9): eligibility of each category in captions, and as a demand on
    pose B; said, asked (P,): the same of supers; column, wanted (P,W,R): super p holds where all terms r of some way w
    do, category[column] == wanted.
    """

    def __init__(self, columns, supers, poses=None):
        """columns, supers: lists of the book. poses: a second Table, which formulas read as "B ..." and "A ..."."""
        book = load_asset("codes")
        kinds = book["kinds"] | book["pair_kinds"]
        self.mark = PAIR if poses else ""
        self.columns = sorted(expand_rows(book, columns), key=lambda row: list(kinds).index(row["kind"]))
        self.groups = [(kind, np.array([[KEYPOINTS.index(place) for place in row["joints"].split()] for row in rows]))
                       for kind, rows in itertools.groupby(self.columns, lambda row: row["kind"])]
        self.names = [kinds[row["kind"]]["categories"] for row in self.columns]
        self.noise = np.float32([kinds[row["kind"]]["noise"] for row in self.columns])
        self.thresholds = np.float32([(kinds[row["kind"]]["thresholds"] + 8 * [np.inf])[:8] for row in self.columns])
        rare = self.flags("rare")
        self.score, self.absolute = self.flags("acc") * (1 + rare), self.flags("abs") * (1 + rare)
        self.read_supers(expand_rows(book, supers), poses)

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


pose_table = functools.cache(functools.partial(CodeTable, "posecodes", "supers"))   # 271 columns, 150 super-posecodes


def keypoints(joints):
    """joints (M,22,3), or (M,24,3) with the middle of both hands -> the 35 places that codes are read from (M,35,3)."""
    at = dict(zip(KEYPOINTS, np.moveaxis(np.asarray(joints, np.float32), 1, 0)))
    for side in ("left", "right"):
        along = at[f"{side}_wrist"] - at[f"{side}_elbow"]
        length = np.maximum(np.linalg.norm(along, axis=-1, keepdims=True), 1e-9)
        at.setdefault(f"{side}_middle2", at[f"{side}_wrist"] + 0.1367 * along / length)  # the hand prolongs the forearm
        for part, (one, two) in LIMB_SEGMENTS.items():
            at[f"{side}_{part}"] = (at[f"{side}_{one}"] + at[f"{side}_{two}"]) / 2
    at["torso"] = (at["pelvis"] + at["neck"] + at["spine3"]) / 3
    return np.stack([at[name] for name in KEYPOINTS], 1)


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


def head_angle(axis, rotmat, top):
    """Angle c, b or a (M,1), degrees, for axis Z, Y or X, where the head is turned by Rz(c) Ry(b) Rx(a) against its
    joint `top` (inclusive). rotmat (M,22,3,3)."""
    joint, R = JOINTS.index("head"), rotmat[:, JOINTS.index("head")]
    while joint != top:
        joint = PARENTS[joint]
        R = rotmat[:, joint] @ R
    sine, cosine = {"X": (R[:, 2, 1], R[:, 2, 2]), "Y": (-R[:, 2, 0], np.hypot(R[:, 2, 1], R[:, 2, 2])),
                    "Z": (R[:, 1, 0], R[:, 0, 0])}[axis]
    return np.degrees(np.arctan2(sine, cosine))[:, None]


def measure(kind, sets, at, rotmat, own=None):
    """The values (M,S) of one kind, metres or degrees. sets (S,k) of places, at (M,35,3), rotmat (M,22,3,3).
    own: the last two in the body's own frame, for what has nothing to do with the floor."""
    at, rotmat = own if own and not kind.endswith(FLOOR) else (at, rotmat)
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
        return head_angle(axis, rotmat, sets[0, 1])
    # what is left is relativePos; a paircode compares a place with itself in the other pose
    return (a if kind.startswith("pair_") else a - others[0])[..., "XYZ".index(axis)]


def stand_upright(at, rotmat):
    """Places and rotations as posecodes read them, turned until the trunk is upright and its hips face front."""
    pelvis, neck, left, right = (at[:, KEYPOINTS.index(name)] for name in ("pelvis", "neck", "left_hip", "right_hip"))
    up, front = neck - pelvis, np.cross(left - right, neck - pelvis)
    turn = np.stack([np.cross(up, front), up, front], 1)                                     # (M,3,3)
    turn /= np.linalg.norm(turn, axis=-1, keepdims=True)
    return at @ turn.swapaxes(1, 2), np.concatenate([(turn @ rotmat[:, 0])[:, None], rotmat[:, 1:]], 1)


@dataclasses.dataclass
class Codes:
    """What is true of M poses (or pairs of poses), column by column; row i belongs to pose i."""
    value: np.ndarray                                      # (M,S) metres or degrees
    category: np.ndarray                                   # (M,S+P) index of the category; of supers: 1 if they hold
    low: np.ndarray                                        # (M,S+P) the least category within the tolerance ...
    high: np.ndarray                                       # (M,S+P) ... and the greatest
    eligibility: np.ndarray                                # (M,S+P) 0 must not be said, 1 may, 2 should
    keypoints: np.ndarray = None                                  # (M,35,3) the places
    rotmat: np.ndarray = None                              # (M,22,3,3)
    body_frame: tuple = None                                      # these two in the body's own frame, if asked for
    target_codes: object = None                                       # of pairs: the Codes of pose B, eligibility as demands


def supers_hold(low, high, table):
    """Which supers can hold (M,P) if every column may take any category from low to high (both M, columns)."""
    terms = (low[:, table.column] <= table.wanted) & (table.wanted <= high[:, table.column])    # (M,P,W,R)
    return terms.all(-1).any(-1).astype(np.int8)                                                # (M,P)


def assign_categories(value, table, others=()):
    """Values (M,S) -> Codes. others: (Codes of pose B, of pose A) where formulas read them."""
    value = np.nan_to_num(value).astype(np.float32)
    # the first category i with value <= threshold i, else the last
    low, category, high = (sum((value + sign * table.noise > threshold).astype(np.int8) for threshold in
                               table.thresholds.T) for sign in (-1, 0, 1))                   # (M,S) each

    def all_columns(mine, name):
        return np.concatenate([mine, *(getattr(other, name)[:, :other.value.shape[1]] for other in others)], 1)

    holds = supers_hold(*2 * [all_columns(category, "category")], table)
    near = supers_hold(all_columns(low, "low"), all_columns(high, "high"), table)
    eligibility = table.score[np.arange(value.shape[1]), category]
    # the support rules that depend on the pose: the super-code speaks for its parts
    row, which = np.nonzero(holds[:, table.silencer] * (category[:, table.silenced] == table.silenced_at))
    eligibility[row, table.silenced[which]] = 0
    return Codes(value, *(np.concatenate(pair, 1) for pair in (
        (category, holds), (low, 0 * holds), (high, near), (eligibility, holds * table.said))))


def posecodes_at(at, rotmat, frame="world"):
    """Posecodes of places (M,35,3), metres, and local rotations (M,22,3,3), both y up and facing +z. -> Codes"""
    at, rotmat, table = np.asarray(at, np.float32), np.asarray(rotmat, np.float32), pose_table()
    own = {"world": lambda *_: None, "body": stand_upright}[frame](at, rotmat)
    codes = assign_categories(np.concatenate([measure(*group, at, rotmat, own) for group in table.groups], 1), table)
    return dataclasses.replace(codes, keypoints=at, rotmat=rotmat, body_frame=own)


@functools.cache
def rest_joints():
    """The embedded body's joints at rest (22,3): one size for everybody, since the thresholds are metres."""
    return load_body().rest


def posecodes(rotmat, facing=True, frame="world"):
    """All posecodes of M poses, rotmat (M,22,3,3). -> Codes

    facing: the people face +z already, as all of the embedded world do. False: they are turned there first.
    frame: "world" is PoseScript's, where up, left and front are those of the room: "above" is nearer to the ceiling.
    "body": those of the trunk, so they also fit who lies or stands on the hands: "above" is nearer to the head.
    """
    rotmat = (rotmat if facing else face_front(rotmat)).detach().float().cpu()
    return posecodes_at(keypoints(forward_kinematics(rotmat, rest_joints())), rotmat, frame)


# ---- 2. Paircodes --------------------------------------------------------------------------------
# A paircode puts measure(A) - measure(B) into a category: how to get from pose A to pose B (negative: it grows).
# Source: PoseFix (Delmas et al. 2023).
@functools.cache
def pair_table():
    """The table of paircodes: 49 columns and the turn of the body, 52 super-paircodes."""
    return CodeTable("paircodes", "pair_supers", pose_table())


def supporting_codes(pairs, codes, first):
    """Posecodes that fulfil a super-paircode that holds -> (rows, columns). first: their first column in formulas."""
    table, width = pair_table(), codes.value.shape[1]
    mine = (table.column >= first) & (table.column < first + width)
    column, wanted, holds = table.column[mine] - first, table.wanted[mine], pairs.category[:, len(table.columns):]
    rows, which = np.nonzero(holds[:, np.nonzero(mine)[0]] * (codes.category[:, column] == wanted))
    return rows, column[which]


def paircodes_at(a, b, turn):
    """Paircodes of Codes a -> b and the turn of the body (M,), degrees about +y from A to B. -> Codes, with `.target_codes`"""
    table, poses = pair_table(), pose_table()
    value = [measure(*group, a.keypoints, a.rotmat, a.body_frame) - measure(*group, b.keypoints, b.rotmat, b.body_frame)
             for group in table.groups[:-1]]
    pairs = assign_categories(np.concatenate([*value, turn[:, None]], 1), table, (b, a))
    width = len(poses.columns)
    demand = poses.absolute[np.arange(width), b.category[:, :width]]
    demand[supporting_codes(pairs, b, len(table.columns))] = 0      # what a super-paircode says already
    pairs.target_codes = dataclasses.replace(b, eligibility=np.concatenate([demand, b.category[:, width:] * poses.asked], 1))
    return pairs


def vertical_turn(a, b):
    """How far the body turns about the vertical from poses a to b (M,22,3,3): degrees (M,), + = to the left."""
    return np.degrees(matrix_to_aa(b[:, 0] @ a[:, 0].mT)[:, 1].detach().float().cpu().numpy())


def paircodes(a, b, facing=True, frame="world"):
    """All paircodes from poses a to b, rotmat (M,22,3,3) each. -> Codes; `.target_codes` holds the posecodes of b.

    facing, frame: see `posecodes`. Not facing: B may have turned since A; places are compared as if both faced front.
    """
    turn = vertical_turn(a, b) if facing else vertical_turn(face_front(a), face_front(b, like=a))
    return paircodes_at(posecodes(a, facing, frame), posecodes(b, facing, frame), turn)


# ---- 3. Short captions and their inverse ---------------------------------------------------------
# A text is a list of sentences; a sentence says one code, or the same of both sides.
#
#   codes of pose i --choose--> [("left", "knee", "straight", "", ""), ...] --say--> "The left knee is straight. ..."
#                                                                   <--statements--
MOST_STATEMENTS, MOST_TOKENS = 15, 90
OPPOSITE = {"at_right": "at_left", "below": "above", "behind": "front"}
OPPOSITE |= {more: less for less, more in OPPOSITE.items()}
LIMB_PARTS = {"arm": ("shoulder", "upperarm", "elbow", "forearm", "wrist", "hand"),
              "leg": ("hip", "thigh", "knee", "shin", "ankle", "foot"), "": ()}          # "": trunk and head have none
LIMB = defaultdict(str, {part: name for name, parts in LIMB_PARTS.items() for part in parts})
phrases = functools.partial(load_asset, "phrases")              # the words


def patterns(code, full=False):
    """The phrase patterns that say a code. full: with the changes of the full captions."""
    book, (side, part, category, _, part2) = phrases(), code
    if full:
        book = book | {key: book[key] | more for key, more in book["full"].items()}
    name = category.removeprefix(PAIR)
    if name != category:
        special = "difference plural" if side == "<plural>" else "difference torso"
        return book["difference"].get(name) or book[special][name]
    if not part2:
        return book["one"][category]
    if part == part2:
        return book["sides"][category]
    return book["two"].get(f"{part} {category} {part2}") or book["two"][category]


def part_name(side, part):
    """What a part is called: ("left", "upperarm") -> "the left upper arm"; side "both" -> "both upper arms"."""
    several = {"both": "both", "own": "the", "opposite": "the opposite"}.get(side)
    names, side = (phrases()["plurals"], several) if several else (phrases()["names"], "the " + side)
    return " ".join([*side.replace("<plural>", "").split(), names.get(part, part)])


def fill_pattern(pattern, code, modal=""):
    """A pattern with its parts named and its verbs open: "the left knee [is|are] straight". modal: "should", "must"."""
    side, part, _, side2, part2 = code
    if modal:                                              # [is|are] -> should be, [touches|touch] -> should touch
        pattern = re.sub(r"\[\w+\|(\w+)\]", lambda verb: f"{modal} {verb[1].replace('are', 'be')}", pattern)
    return pattern.format(a=part_name(side, part), b=part_name(side2, part2), x=part_name("left", part),
                          y=part_name("right", part), p=part_name("own", part))


def conjugate(text, subject=""):
    """Open verbs -> the form that a subject asks for, "" for the one that stands before the verb."""
    subject = subject or text.partition(" [")[0]
    many = " and " in subject or subject.rpartition(" ")[2] in phrases()["plurals"].values()
    return re.sub(r"\[(\w+)\|(\w+)\]", lambda verb: verb[2 if many else 1], text)


def mirror_code(code):
    """The code that says of the other side what this one says of its own."""
    other = {"left": "right", "right": "left", "at_right": "at_left", "at_left": "at_right"}
    return tuple(other.get(word, word) for word in code)


def claimless_sentences():
    """Sentences of texts that say nothing that joints could show."""
    return [phrases()["nothing"], *(add_view(view).lower().rstrip(".") for view in VIEWS)]


def count_tokens(line):
    """Words and marks of a sentence, its full stop included."""
    return len(line.split()) + 1


def eligible_codes(table, codes, i):
    """{code: eligibility} of row i: what may be said of it."""
    row, category = codes.eligibility[i], codes.category[i]
    return {table.codes[s][category[s]]: int(row[s]) for s in np.flatnonzero(row)}


@functools.cache
def implications(key):
    """[(conditions, targets)] of a list of the tables: where the conditions are said, the targets need not be."""
    def code(text):
        words = text.split()
        side2, part2 = side_part(words.pop()) if words[-1] in KEYPOINTS else ("", "")
        (side, part), category = side_part(words[0]), " ".join(words[1:])
        if (side, part) == ("right", part2):               # of two sides the left one is named first
            side, category, side2 = "left", OPPOSITE.get(category, category), "right"
        return side, part, category, side2, part2

    return [tuple({code(sided(text, side)) for text in texts} for texts in (conditions, targets))
            for conditions, *targets in phrases()[key] for side in ("left", "right")]


def exclusion_keys(code):
    """Keys that only one code of a text may have: a hand is near one part of a limb, aligned with one thing."""
    side, part, category, side2, part2 = code
    aligned = {(side, part)} if category.endswith("-aligned") else set()
    return aligned | {(side, part, side2, LIMB[part2])} if part != part2 and (aligned or category == "close") else set()


def informativeness(code):
    """How much a code tells of where the joints are, millimetres: the most specific entry of a measured table."""
    table, (_, part, category, _, part2) = phrases()["worth"], code
    moved = PAIR + part if category.startswith(PAIR) else part
    keys = (f"{part} {category} {part2}", f"{part} {category}", moved, part, "")
    return next(table[key] for key in keys if key in table)


def text_position(code):
    """Where a code stands in a text: trunk, head, arms, legs, and within these from the top."""
    return next((r, parts.index(code[1])) for r, parts in enumerate(phrases()["regions"].values()) if code[1] in parts)


def group_sides(said):
    """Codes -> what each sentence says, in the same order: [(code,) or (left code, right code), ...]."""
    units, done = [], set()
    for code in said:
        if code not in done:
            both = code != mirror_code(code) and mirror_code(code) in said and "{b}" not in patterns(code)[0]
            units.append(tuple(sorted((code, mirror_code(code)))) if both else (code,))             # "left" before "right"
            done.update(units[-1])
    return units


def choose_codes(may, rng, demand=False):
    """{code: eligibility} -> the codes of one text, in order of speech, within its limits. demand: see `say`.

    What tells most of the pose goes first, so a listener may take the rest for the usual: on the embedded world this
    brings a guess 20 mm nearer than a random choice. A little chance on top, none without rng.
    """
    codes, said, crowded = set(may), [], set()
    for conditions, targets in implications("implied"):
        if conditions <= codes:
            codes -= targets
    # eligibility 2 doubles a code's worth (e^0.7), chance changes it by up to a sixth
    score = {code: math.log(informativeness(code)) + 0.7 * e + (0.15 * rng.random() if rng else 0) for code, e in may.items()}
    for code in sorted(codes, key=lambda code: (-score[code], code)):
        if not exclusion_keys(code) & crowded:
            crowded |= exclusion_keys(code)
            said.append(code)
    said = said[:MOST_STATEMENTS]
    # what does not fit in its shortest words goes, the least telling first
    while sum(count_tokens(wordings(unit, demand)[0]) for unit in group_sides(said)) > MOST_TOKENS:
        said.pop()
    return sorted(said, key=lambda code: (text_position(code), code))


def parts_in_code(code):
    """The parts that a code names, one side at a time: [(side, part), ...]."""
    single = {many: one for one, many in phrases()["plurals"].items()}
    return [(side, single.get(part, part)) for own, part in (code[:2], code[3:]) if part
            for side in (("left", "right") if own == "<plural>" else (own,))]


def names_changed_part(code, changed):
    """Does a code name one of the changed (side, part), or a part further down its limb?"""
    lines = [(side, part, ("person", "body", "torso", LIMB[part], *LIMB_PARTS[LIMB[part]]))
             for side, part in parts_in_code(code)]
    return any((own, above) in changed for side, part, line in lines for above in line[:line.index(part) + 1]
               for own in ("", side))


def choose_difference_codes(pairs, i, rng):
    """Codes of pairs -> the statements of a difference text: paircodes first, then demands on what changed.

    Where something of a limb moves far, its slight moves go unsaid."""
    moves = eligible_codes(pair_table(), pairs, i)
    limbs = {code: {(side, LIMB[part]) for side, part in parts_in_code(code)} for code in moves}  # trunk and head are one
    far = {limb for code in moves if "slightly" not in code[2] for limb in limbs[code]}
    changed = {part for code in moves for part in parts_in_code(code)}
    ends = {code: e for code, e in eligible_codes(pose_table(), pairs.target_codes, i).items() if names_changed_part(code, changed)}
    # + 6: every move goes before every demand; where B ends up says less than which way things go
    moves = {code: e + 6 for code, e in moves.items() if "slightly" not in code[2] or not limbs[code] & far}
    return choose_codes(moves | ends, rng, demand=True)


@functools.cache
def wordings(unit, demand):
    """The sentences for one code, or for those of both sides, the shortest first. demand: see `say`."""
    name = ("both", *unit[0][1:]) if len(unit) > 1 else unit[0]
    modals = ("should", "must") if demand and not name[2].startswith(PAIR) else ("",)
    lines = [conjugate(fill_pattern(pattern, name, modal)) for pattern in patterns(name) for modal in modals]
    return sorted(lines, key=count_tokens)


def to_text(said, rng, demand=False):
    """Statements -> text. demand: posecodes are asked for ("should be straight"), as in a difference text.

    Phrases are drawn at random; one sentence after the other of a text over its limit, or all without rng, is short.
    """
    choices = [wordings(unit, demand) for unit in group_sides(said)]
    lines = [choice[rng.integers(len(choice)) if rng else 0] for choice in choices]
    for k in rng.permutation(len(lines)) if rng else ():
        if sum(map(count_tokens, lines)) > MOST_TOKENS:
            lines[k] = choices[k][0]
    return " ".join(line[0].upper() + line[1:] + "." for line in lines or [phrases()["nothing"]])


def caption(codes, i, rng):
    """Pose i in words, of `posecodes`; without rng always the same. -> at most 15 statements, 90 words and marks"""
    return to_text(choose_codes(eligible_codes(pose_table(), codes, i), rng), rng)


def difference(pairs, i, rng):
    """How to get from pose A to pose B of pair i, in words; never empty. pairs: of `paircodes`."""
    return to_text(choose_difference_codes(pairs, i, rng), rng, demand=True)


VIEWS = ("front", "right", "back", "left")                 # the side turned to the camera, one for each quarter turn


def add_view(view, text=""):
    """A caption that first says which side of the person a photograph shows; view: one of VIEWS, or "" for none."""
    return f"Seen from the {view}. {text}".strip() if view else text


def view_in(text):
    """The view that `show_side` put into a text, "" where there is none."""
    return next((view for view in VIEWS if add_view(view).lower() in text.lower()), "")


# ---- 4. Full captions ----------------------------------------------------------------------------
# They say all that is eligible, in sentences that share what they can. Source: PoseScript, PoseFix.
#
#   {code: eligibility} --kept--> codes --merged--> {name: codes} --clauses--> (subject, template) --factored--> text
#
# A name is a code or stands for several: of both sides, of a limb. Clauses of one template share a sentence ("The left
# hand and foot are behind the body."), and so do clauses of one subject ("The left hand is near the head and behind the
# body."). Reading takes a sentence apart and looks every subject up with every template.
SKIPPED, MERGED = 0.15, 0.95                               # the published probabilities
MATES = {"hand": "elbow", "forearm": "upperarm", "foot": "knee", "shin": "thigh"}       # of these two, say the limb
MATES |= {mate: part for part, mate in MATES.items()}
PREFIX = r"(?:(?:the|both) (?:left |right )?)?"            # of a subject
COPULA = re.compile(r"\{a\} (?:\[is\|are\]|is|are|should be|must be) ")


def subsample(may, rng):
    """{code: eligibility} -> the codes that are said: chance skips some that are not rare, never everything."""
    return [code for code, e in may.items() if e > 1 or rng is None or rng.random() >= SKIPPED] or list(may)


def implied_by_order(said):
    """The codes that follow from two others by order: a < c, where a < b and b < c are said."""
    links = {link: code for code in said if code[2] in OPPOSITE
             for link in ((code[2], code[:2], code[3:]), (OPPOSITE[code[2]], code[3:], code[:2]))}
    return {code for (way, a, c), code in links.items()
            if any((way, a, b) in links and (way, b, c) in links for _, _, b in links)}


@functools.cache
def merge_options(code):
    """Under which names a code can be said: [(name, all codes that it stands for), ...], the widest first."""
    side, part, category, side2, part2 = code
    mate, mate2, found = MATES.get(part), MATES.get(part2), {code: {code}}
    for one, two in [(mate, mate2)] if part == part2 else [(mate, part2), (part, mate2)]:
        if one is not None and two is not None:
            name = side, part if one == part else LIMB[part], category, side2, part2 if two == part2 else LIMB[part2]
            found[name] = {code, (side, one, category, side2, two)}
    for name, codes in list(found.items()) if side in ("left", "right") and part != part2 else ():
        _, one, category, side2, two = name if side == "left" else mirror_code(name)
        near = {"left": "own", "right": "opposite"}.get(side2, side2)
        found["both", one, category, near, two] = codes | {*map(mirror_code, codes)}
    known = pose_table().where.keys() | pair_table().where.keys()
    return sorted(((name, codes) for name, codes in found.items() if codes <= known), key=lambda way: -len(way[1]))


def merge_codes(said, rng):
    """Codes -> {name: the codes that it stands for}. A name needs them all to be said, so that it can be undone."""
    units, free = {}, set(said)
    for code in said:
        if code in free:
            name, codes = next(way for way in merge_options(code) if len(way[1]) == 1
                               or way[1] <= free and (rng is None or rng.random() < MERGED))
            units[name] = codes
            free -= codes
    return units


def caption_units(codes, i, rng=None):
    """What the full caption of pose i, or text of pair i, says: {name: the codes that it stands for}."""
    may = eligible_codes(pair_table() if codes.target_codes else pose_table(), codes, i)
    said = subsample(may, rng)
    if codes.target_codes:
        changed = {part for code in said if code[1] != "person" for part in parts_in_code(code)}
        may = {code: e for code, e in eligible_codes(pose_table(), codes.target_codes, i).items() if names_changed_part(code, changed)}
        return merge_codes(said, rng) | merge_codes(subsample(may, rng), rng)
    every, outer = set(said), implied_by_order(said)
    rules = [rule for key in ("redundant", "contradicted") for rule in implications(key) if rule[0] <= every]
    # a name goes where each of its codes follows from codes that it does not stand for
    return {name: own for name, own in merge_codes([code for code in said if code not in outer], rng).items() if not all(
        any(code in targets and not conditions & own for conditions, targets in rules) for code in own)}


@functools.cache
def subject_pattern():
    """A regular expression of a subject, "the left upper arm", or of a list of them, "both feet and the left hand"."""
    names, many, regions = (phrases()[key] for key in ("names", "plurals", "regions"))
    words = {"face", *many.values(), *(names.get(part, part) for parts in regions.values() for part in parts)}
    part = rf"{PREFIX}(?:{'|'.join(sorted(words))})\b"
    return rf"\b(?=the|both){part}(?:(?:, | and ){part})*"


@functools.cache
def clause_options(name, modal="", full=True):
    """All that can be said by a name: [("the left hand", "{a} [is|are] near the head"), ...]. The subject may be ""."""
    texts = [fill_pattern(pattern, name, modal) for pattern in patterns(name, full)]
    return [(one, text.replace(one, "{a}", 1)) for text in texts for one in (re.findall(subject_pattern(), text) or [""])[:1]]


def join_words(words):
    """["the left hand", "the left foot", "the head"] -> "the left hand, the left foot and the head"."""
    return " and ".join(", ".join(words).rsplit(", ", 1))


def group_clauses(clauses, rng):
    """Clauses [(subject, template), ...] -> [those of one sentence, ...], in order."""
    groups, free, out = {}, set(range(len(clauses))), []
    each_other = {"the " + many for many in phrases()["plurals"].values()}
    for k, (subject, template) in enumerate(clauses):
        form = template.startswith("{a} ") and (COPULA.match(template) or [""])[0]  # only like goes with like
        groups.setdefault((subject, form), []).append(k)
        # "the hands and knees are close together" would be another thing
        groups.setdefault((template, subject if subject in each_other else ""), []).append(k)
    groups = sorted(groups.values(), key=len, reverse=True)
    if rng:
        rng.shuffle(groups)
    for group in groups:
        group = [k for k in group if k in free][:4]        # a sentence has an end
        if len(group) > 1:
            out.append(group)
            free -= set(group)
    return [[clauses[k] for k in group] for group in sorted(out + [[k] for k in free])]


def join_clauses(group):
    """Clauses of one subject, or of one template -> a sentence."""
    subjects, (first, *rest) = (list(dict.fromkeys(column)) for column in zip(*group))
    start, link = re.match(PREFIX, subjects[0])[0], COPULA.match(first)
    if {start} == {re.match(PREFIX, subject)[0] for subject in subjects}:
        subjects[1:] = [subject.removeprefix(start) for subject in subjects[1:]]
    rest = [more[link.end():] if link else more.removeprefix("{a}").strip() for more in rest]
    text = join_words([first, *(more.replace("{a}", "[it|them]") for more in rest)])
    return conjugate(text.replace("{a}", join_words(subjects)), join_words(subjects))


def full_caption(codes, i, rng=None):
    """The full caption of pose i, or text of pair i, by the published pipeline. codes: of `posecodes` or `paircodes`.

    rng: np.random.Generator of all that is left to chance: what is skipped, merged, grouped, the words, the order.
    None: one text for a pose, the most complete: nothing is skipped, all is merged, every phrase is its list's first.
    """
    units, chance = caption_units(codes, i, rng), defaultdict(rng.random if rng else float)
    order = [0, *(1 + rng.permutation(3))] if rng else range(4)
    modals = {name: "" if codes.target_codes is None or name[2].startswith(PAIR) else ("should", "must")[chance["modal"] > 0.5]
              for name in units}
    names = sorted(units, key=lambda name: (modals[name], order[text_position(name)[0]], text_position(name), name))
    # the same words for the same thing: they can be shared
    said = [ways[int(len(ways) * chance[name[2]])] for name in names for ways in [clause_options(name, modals[name])]]
    lines = [join_clauses(group) for group in group_clauses(said, rng)] or [phrases()["nothing"]]
    return " ".join(line[0].upper() + line[1:] + "." for line in lines)


def full_captions(poses, seed=0, deterministic=False, frame="world", chunk=1000):
    """Full captions of a stream of poses (22,3,3), one by one; only a chunk of them is held in memory.

    Number i is a pure function of (pose i, seed, i), or of the pose alone if deterministic. frame: see `posecodes`.
    """
    poses = enumerate(poses)
    while rows := list(itertools.islice(poses, chunk)):
        codes = posecodes(torch.stack([pose for _, pose in rows]), facing=False, frame=frame)
        for k, (i, _) in enumerate(rows):
            yield full_caption(codes, k, None if deterministic else np.random.default_rng((seed, i)))


@functools.cache
def sentence_index():
    """{(subject, template, its verb in either form): the codes that they say}: every clause, compact or full."""
    known, codes = {("", "{a}" + line): () for line in claimless_sentences()}, [*pose_table().where, *pair_table().where]
    for (name, said), modal, full in itertools.product(
            itertools.chain(*map(merge_options, codes)), ("", "should", "must"), (False, True)):
        for (subject, template), thing in itertools.product(clause_options(name, modal, full), ("hand", "hands")):
            key = subject, conjugate(template, thing)          # two readings would be no reading
            assert known.setdefault(key, said) == said, key
    return known


@functools.lru_cache(1 << 16)
def parse_sentence(line):
    """A sentence of `sentences` -> the codes that it says; None where it is outside of the grammar."""
    names = (re.findall(subject_pattern(), line) or [""])[0]
    first, *rest = re.split(", | and ", line.replace(names, "{a}", 1))
    start, link = re.match(PREFIX, names)[0], (COPULA.match(first) or [""])[0]
    pieces = [[first], *([re.sub(r"\b(it|them)\b", "{a}", piece), "{a} " + piece, "{a}" + piece, link + piece]
                         for piece in rest)]
    subjects = [one if re.match(PREFIX, one)[0] else start + one for one in re.split(", | and ", names)]
    said = [next((sentence_index()[one, way] for way in piece if (one, way) in sentence_index()), None)
            for one in subjects for piece in pieces]
    return None if None in said else tuple(itertools.chain(*map(sorted, said)))


def split_sentences(text):
    """Text -> its sentences as they are spelled here: lower case, single spaces, no marks but commas."""
    # a language model's text may be in any case and have spaces before its full stops
    pieces = re.split(r"[.!?;\n]+", text.lower().replace(" ,", ","))
    return [line for line in (" ".join(re.findall(r"\w+,?", piece)) for piece in pieces) if line]


def statements(text):
    """Text -> the codes that it says, exactly as they were chosen; sentences outside the grammar are skipped."""
    return [code for line in split_sentences(text) for code in parse_sentence(line) or ()]


def is_true(code, codes, i):
    """Is a code true of row i? -> (within the tolerance, exactly)."""
    moves = code[2].startswith(PAIR)                       # a demand is about pose B
    table, codes = (pair_table(), codes) if moves else (pose_table(), codes.target_codes or codes)
    if codes.value.shape[1] != len(table.columns):         # "raise the hand" says nothing true of a single pose
        return False, False
    low, category, high = codes.low[i], codes.category[i], codes.high[i]
    return (any(low[s] <= c <= high[s] for s, c in table.where[code]),
            any(category[s] == c for s, c in table.where[code]))


def check_statements(text, codes, i):
    """Each statement of a text against row i of Codes (of poses or pairs): [(within the tolerance, exactly), ...].

    A sentence outside the grammar counts as one statement that does not hold.
    """
    return [verdict for codes_said in map(parse_sentence, split_sentences(text)) for verdict in (
        [(False, False)] if codes_said is None else [is_true(code, codes, i) for code in codes_said])]


def check_text(text, rotmat, source=None):
    """Each statement of a text against a pose (22,3,3): [(within the tolerance, exactly), ...].

    source: pose A of a difference text, whose pose B is rotmat. Many at once: `verdicts` on codes made beforehand.
    """
    return check_statements(text, posecodes(rotmat[None]) if source is None else paircodes(source[None], rotmat[None]), 0)


def caption_words():
    """Every word that the two grammars can say."""
    units = {group_sides(said)[0] for code in [*pose_table().where, *pair_table().where]
             for said in ([code], [code, mirror_code(code)])}
    return {word for unit in units for demand in (False, True) for line in wordings(unit, demand)
            for word in line.split()} | {*phrases()["nothing"].split()}


# ---- 5. Run me -----------------------------------------------------------------------------------
@dataclasses.dataclass
class Config:
    """Measure one pose, name what is measured, say it, and read it back."""
    seed: int = 0  # of the wording


def main():
    """Prints one pose as posecodes, as a short and a full caption, and the statements that are read back."""
    config = cli(Config)
    codes = posecodes(example_pose()[None])
    rng = np.random.default_rng(config.seed)
    table = pose_table()

    print(f"measured      {len(table.columns)} values, such as")
    for column in (0, 1, 20, 60):
        row = table.columns[column]
        category = table.names[column][codes.category[0, column]]
        print(f"    {row['kind']} {row['joints']}: {codes.value[0, column]:.2f} -> {category}")

    text = caption(codes, 0, rng)
    print(f"said          {text}")
    print(f"in full       {full_caption(codes, 0, rng)}")
    print("read back")
    for code, (within, _) in zip(statements(text), check_statements(text, codes, 0)):
        print(f"    {code}: {within}")


if __name__ == "__main__":
    run_main(main)
