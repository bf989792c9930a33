"""Measures a model: how far its poses are off, how true its texts are, how fast it answers.

Every task is evaluated on people of the test split, whose poses and captions are known:

    generated pose   MPJPE, PA-MPJPE    how far the joints are off, in mm
                     MPJRE              how far their rotations are off, in degrees
                     statements         share of the caption's statements that hold for the pose
    generated text   precision          share of its statements that are true of the pose
                     recall             share of the reference's statements that it makes too
                     BLEU-4, ROUGE-L    overlap with the wording of the reference
                     same               share of pairs of equal poses that are told to be equal
    both             R-precision, FID   distances in the space of a separate retrieval model
    one of a group   right person       share of answers that are nearest to the person asked for
                     nobody             share of questions that fit nobody which are answered so

A caption is a list of statements about joints (captions.py), so whether it is true is measured, not
judged. Beside the figures of the model stand baselines, which it must beat, and upper bounds, which
it cannot:

    text2pose    mean pose, nearest caption  <  model  <  tokenizer's round trip, ground truth

Not here: metrics of motion, and metrics that need a large language model as a judge.

Letters: B batch, T words, J=22 joints, N pose tokens, K codes, P patches, d width of an embedding,
n questions.

    python eval.py  # the shipped weights on the test split
    python eval.py --tasks text2pose --n 64 --decode argmax,soft --json out/eval.json
    python eval.py --failures out/failures.png --n 64  # what typical failures look like
    python eval.py --speed  # a pose in one step against one by one; how time and memory grow
"""
import copy
import ctypes
import functools
import json
import math
import pathlib
import re
import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from captions import (
    VIEWS, add_view, caption, check_statements, difference, paircodes, posecodes, rest_joints,
    split_sentences, statements, to_text, view_in,
)
from data import (
    HIDDEN_PARTS, NOBODY, PLACES, POOL, REASONING, SEVEN, TASKS, Mixture, World, activity_table,
    contact_sheet, drop_introduction, records_with_pose, request_metrics, save_png, vocabulary,
)
from sample import (
    AVERAGED, DECODINGS, CachedModel, generate, question, rate, sheet_row, validate_decoding,
    want_of,
)
from tokenizer import (
    TINY, Encoder, TokenizerConfig, UserError, atomic_write, cli, face_front, forward_kinematics,
    load_body, matrix_to_sixd, mirror, progress_bar, run_main, turn_root, validate_writable,
)
from unipose import (
    PAPER_TEXT, RETRIEVAL_PREFIX, SIZES, Row, UniPose, collate, default_dtype, find_device, load,
    load_strictly, model_config, read_config, read_tensors, require_codes, require_stages,
    trainable, word_tokenizer,
)


# ---- 1. Poses: how far the joints are off --------------------------------------------------------
def joint_errors(pred, target):
    """How far each joint is off, pelvises at the origin: (B,J,3) metres -> (B,J) mm."""
    pred = pred - pred[:, :1]
    target = target - target[:, :1]
    return 1000 * (pred - target).norm(dim=-1)


def mpjpe(pred, target):
    """Mean per-joint position error: pelvises at the origin, no rotation removed.

    pred, target: (B,J,3) metres. Returns (B,) mm. The paper's text2pose figures average 52 joints,
    30 of them rigid fingers, so they are not comparable joint for joint.
    """
    return joint_errors(pred, target).mean(-1)


def project_rotation(matrix):
    """The rotation nearest to any (...,3,3) matrix. Of an average of rotations this is their
    chordal mean."""
    u, _, vt = torch.linalg.svd(matrix)

    # a reflection is not a rotation: flip the axis with the smallest singular value
    sign = torch.ones_like(matrix[..., 0])
    sign[..., 2] = torch.linalg.det(u @ vt).sign()
    return u @ (sign[..., None] * vt)


def similarity_align(pred, target):
    """pred (B,J,3), rotated, scaled and moved to lie closest to target (Umeyama 1991). In float64.
    """
    pred = pred.double()
    target = target.double()
    pred_centred = pred - pred.mean(1, keepdim=True)
    target_centred = target - target.mean(1, keepdim=True)

    rotation = project_rotation(pred_centred.mT @ target_centred)                     # (B,3,3)
    rotated = pred_centred @ rotation                                                 # (B,J,3)
    variance = pred_centred.square().sum((1, 2)).clamp(min=1e-12)
    scale = (rotated * target_centred).sum((1, 2)) / variance                         # (B,)
    return scale[:, None, None] * rotated + target.mean(1, keepdim=True)


def pa_mpjpe(pred, target):
    """MPJPE after the best similarity transform per sample. (B,J,3) metres -> (B,) mm."""
    return 1000 * (similarity_align(pred, target) - target).norm(dim=-1).mean(-1)


def mpjre(pred, target):
    """Mean per-joint rotation error: the angle between predicted and true rotation of each joint.

    pred, target: (B,22,3,3), relative to the parent joint; the root's, of the whole person, counts
    as one of the 22. Returns (B,) degrees. Papers print it times 100 without a unit, probably from
    radians: their 10.4 would be 6 degrees.
    """
    between = pred.double() @ target.double().mT                                      # (B,22,3,3)
    cosine = (between.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2                     # (B,22)

    # the skew part is 2 sin(angle) times the axis; acos alone loses half of the digits at 0 and pi
    skew = between - between.mT
    axis = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)       # (B,22,3)
    angle = torch.atan2(axis.norm(dim=-1) / 2, cosine)                                # (B,22)
    return angle.rad2deg().mean(-1)


EXAMPLES = slice(4096, 6144, 2)  # no edits; nor asked about, unless there are 2,048 questions


@functools.cache
def activity_examples():
    """The joints (m,22,3) of people and of their mirror images, and what these do.

    They are of the split "test", whose people show one activity each; those of "train" may do parts
    of several.
    """
    world = World("test", EXAMPLES.stop)
    poses = world.poses[EXAMPLES]
    joints = forward_kinematics(torch.cat([poses, mirror(poses)]), rest_joints())
    return joints, 2 * world.activity[EXAMPLES]


def nearest_activities(poses):
    """What people do, judged by the person whose joints are nearest among `activity_examples`: 89 %
    of the true poses of the test split are judged rightly.

    poses: (n,22,3,3) that face +z. Returns n names.
    """
    examples, activities = activity_examples()
    names = []
    for joints in forward_kinematics(poses, rest_joints()):
        distance = mpjpe(joints.expand_as(examples), examples)                        # (m,)
        names.append(activities[distance.argmin()])
    return names


# ---- 2. Texts: overlap with the wording of the reference -----------------------------------------
# "1.5" and "half-bent" stay whole
PUNCTUATION = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|(?<=\d)-|[!-&(-+/:-@\[-`{-~]")


def bleu_words(text):
    """The WMT `13a` tokenisation for plain ASCII: punctuation stands alone, case is kept."""
    return PUNCTUATION.sub(r" \g<0> ", text).split()


def ngrams(words, n):
    """How often each run of n words occurs in a list -> Counter."""
    shifted = [words[start:] for start in range(n)]
    return Counter(zip(*shifted))


def bleu4(pred, target):
    """Corpus BLEU with 1- to 4-grams, one reference each, no smoothing (Papineni 2002). Lists of
    str -> 0..1."""
    matches = np.zeros(4)
    totals = np.zeros(4)
    pred_length = 0
    target_length = 0
    for pred_text, target_text in zip(pred, target):
        pred_words = bleu_words(pred_text)
        target_words = bleu_words(target_text)
        pred_length += len(pred_words)
        target_length += len(target_words)
        for n in range(1, 5):
            pred_ngrams = ngrams(pred_words, n)
            matches[n - 1] += (pred_ngrams & ngrams(target_words, n)).total()
            totals[n - 1] += pred_ngrams.total()

    if not matches.all():
        return 0.0  # a geometric mean with a zero in it

    # precision alone would favour short texts
    brevity = min(0.0, 1 - target_length / pred_length)
    return math.exp(brevity + np.log(matches / totals).mean())


def common_subsequence(a, b):
    """Length of the longest common subsequence of two word lists, by dynamic programming."""
    best = [0] * (len(b) + 1)  # best[j]: of the words of a so far, and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = best[j]
            best[j] = diagonal + 1 if word == other else max(above, best[j - 1])
            diagonal = above
    return best[-1]


def rouge_l(pred, target):
    """Mean ROUGE-L F1 (Lin 2004): lower case, letters and digits only, no stemming. Lists of str ->
    0..1."""
    scores = []
    for pred_text, target_text in zip(pred, target):
        pred_words = re.findall(r"[a-z0-9]+", pred_text.lower())
        target_words = re.findall(r"[a-z0-9]+", target_text.lower())
        length = len(pred_words) + len(target_words)
        scores.append(2 * common_subsequence(pred_words, target_words) / max(length, 1))
    return float(np.mean(scores))


# ---- 3. Statements: what is true -----------------------------------------------------------------
def codes_of(poses, sources=None):
    """The posecodes of poses (n,22,3,3) that face +z, or the paircodes from sources (n,22,3,3) to
    them."""
    if sources is None:
        return posecodes(poses)
    return paircodes(sources, poses)


def true_texts(poses, sources, seed):
    """n true texts: captions of poses (n,22,3,3), or differences from sources (n,22,3,3) to them.
    """
    codes = codes_of(poses, sources)
    write = caption if sources is None else difference
    return [write(codes, k, np.random.default_rng((seed, k))) for k in range(len(poses))]


def share_true(verdicts):
    """Verdicts [(within tolerance, exactly), ...] -> the share of True of each; 0 for no verdicts.
    """
    if not verdicts:
        return 0.0, 0.0
    within = sum(near for near, _ in verdicts) / len(verdicts)
    exact = sum(exactly for _, exactly in verdicts) / len(verdicts)
    return within, exact


def pose_statement_metrics(texts, poses, sources=None):
    """Generated poses (n,22,3,3) that face +z against their captions, or against differences from
    sources.

    Returns the share of all statements that hold: statement_accuracy within the tolerance of the
    captioning pipeline (a category that its noise could have reached), statement_accuracy_exact
    without it.
    """
    codes = codes_of(poses, sources)
    verdicts = []
    for k, text in enumerate(texts):
        verdicts += check_statements(text, codes, k)

    within, exact = share_true(verdicts)
    return {"statement_accuracy": within, "statement_accuracy_exact": exact}


def text_statement_metrics(pred, target, poses, sources=None):
    """Generated texts against the poses that they describe, and against the statements of the
    references.

    precision, precision_exact: share of the generated statements that hold; a sentence outside the
    grammar never holds, and a repeated sentence counts once. recall: share of the references'
    statements that were generated. f1: of both.
    """
    codes = codes_of(poses, sources)
    verdicts = []
    recalled = []
    for k, (text, reference) in enumerate(zip(pred, target)):
        lines = [line.strip() for line in text.lower().split(".")]
        verdicts += check_statements(". ".join(dict.fromkeys(lines)), codes, k)

        found = set(statements(text))
        recalled += [statement in found for statement in set(statements(reference))]

    precision, exact = share_true(verdicts)
    recall = sum(recalled) / max(len(recalled), 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"precision": precision, "precision_exact": exact, "recall": recall, "f1": f1}


def view_metrics(texts, views):
    """Do texts name the side from which a photograph shows the person? views: the true side of
    each, "" for none.

    view_accuracy: share of correct texts; view_balanced: mean over the sides of the share of each.
    {} without views. UniPose §4.3: general models often mistake the orientation.
    """
    correct = {}
    for view in VIEWS:
        own_texts = [text for text, true_view in zip(texts, views) if true_view == view]
        if own_texts:
            correct[view] = [view_in(text) == view for text in own_texts]
    if not correct:
        return {}
    return {
        "view_accuracy": float(np.mean(sum(correct.values(), []))),
        "view_balanced": float(np.mean([np.mean(hits) for hits in correct.values()])),
    }


def says_only(sentence, answer):
    """Whether an answer says a sentence, once or several times, and nothing else; a pose does not.
    """
    if not isinstance(answer, str):
        return False
    return set(split_sentences(answer)) == set(split_sentences(sentence))


def truest_of(text, codes, people):
    """The person, of several rows of Codes, of whom the largest share of a text's statements is
    true; None if there is no such person, but several."""
    shares = []
    for i in people:
        within, _ = share_true(check_statements(text, codes, i))
        shares.append(within)
    best = max(shares)
    return people[shares.index(best)] if shares.count(best) == 1 else None


# ---- 4. Embeddings: distances in the space of the retrieval model --------------------------------
def hit_rate(similarity, k):
    """Is the own column of each row (n,n), the diagonal, among the k most similar ones? -> (n,)

    A tie is decided by a fair coin: of t columns that share the last s places, each is a hit with
    probability s/t. So embeddings that are all alike score what chance scores. Raises UserError for
    NaN, which would be no better and no worse than anything.
    """
    if similarity.isnan().any():
        raise UserError("the embeddings hold NaN, so retrieval cannot be measured: train the model "
                        "again with a lower --lr")
    own = similarity.diagonal()[:, None]                                            # (n,1)
    better = (similarity > own).sum(1)                                              # (n,)
    tied = (similarity == own).sum(1)                                               # own included
    return ((k - better).clamp(min=0) / tied).clamp(max=1)                          # (n,)


def r_precision(query, answer, top=3, group=32):
    """Share of queries whose own answer is among the best k of its group, k = 1..top.

    query, answer: (n,d) unit vectors. Returns a list. Groups are consecutive rows, so shuffle first
    if the order means anything; an incomplete last group is dropped. Raises UserError for NaN.
    """
    complete = len(query) // group * group
    if not complete:
        return []
    query = query[:complete].view(-1, group, query.size(1))     # (n/group,group,d)
    answer = answer[:complete].view(-1, group, answer.size(1))  # (n/group,group,d)
    similarities = query @ answer.mT
    rates = []
    for k in range(1, top + 1):
        hits = torch.cat([hit_rate(similarity, k) for similarity in similarities])  # (n,)
        rates.append(hits.float().mean().item())
    return rates


def recall_at(query, answer, tops=(1, 5, 10, 20)):
    """Share of queries whose own answer is among the best k of the whole set.

    query, answer: (n,d) unit vectors. Returns a list. Raises UserError for NaN.
    """
    similarity = query @ answer.mT
    return [hit_rate(similarity, k).float().mean().item() for k in tops]


def frechet(a, b):
    """FID (Heusel 2017): distance of two clouds (n,d) as if both were Gaussian, in float64.

    tr (A B)^1/2 is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, which is symmetric
    even where A and B are singular (fewer samples than dimensions): no matrix root of a product, no
    complex numbers.
    """
    a = a.double()
    b = b.double()
    cov_a = torch.cov(a.T)                                                            # (d,d)
    cov_b = torch.cov(b.T)                                                            # (d,d)

    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                           # (d,d)
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()

    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(0.0, distance.item())  # rounding can leave -1e-16


# ---- 5. The retrieval model: a measuring device, not a part of UniPose ---------------------------
class Retrieval(nn.Module):
    """Poses and captions, or pose pairs and differences, as unit vectors in one space (UniPose
    appendix B.2).

    pose   the tokenizer's encoder -> 40 positions of d channels; the pair version joins A and B
           position by position; a convolution with the positions as channels leaves one vector
    text   word embeddings -> biGRU with a learned initial state -> one vector

    One module serves poses and pairs: pose encoder, text side and scale are shared (the official
    code trains two networks). words: size of the text vocabulary (the official code uses frozen
    DistilBERT embeddings, here they are learned); d: width, 512 in the paper.
    """

    def __init__(self, words, d=128):
        super().__init__()
        self.config = {"words": words, "d": d}
        encoder_config = TokenizerConfig(code_dim=d, hidden=d, upsample_step=1)
        self.pose_encoder = Encoder(encoder_config)
        self.pair_encoder = nn.Sequential(
            nn.Conv1d(2 * d, 2 * d, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(2 * d, d, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(d, d, 3, padding=1),
        )
        self.pool = nn.Conv1d(encoder_config.n_tokens, 1, 3, padding=1)
        self.word_embedding = nn.Embedding(words, d)
        self.text_input = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d), nn.Linear(d, d))
        self.gru = nn.GRU(d, d, batch_first=True, bidirectional=True)
        self.gru_state = nn.Parameter(torch.randn(2, 1, d))
        self.text_output = nn.Sequential(
            nn.Linear(2 * d, d), nn.LayerNorm(d), nn.LeakyReLU(0.2), nn.Linear(d, d))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def encode_pose(self, pose):
        """pose (B,22,3,3) -> (B,d,40): one vector for each of 40 positions."""
        return self.pose_encoder(matrix_to_sixd(pose))

    def embed_pose(self, pose):
        """pose (B,22,3,3) -> (B,d), length 1."""
        pooled = self.pool(self.encode_pose(pose).mT)                                 # (B,1,d)
        return F.normalize(pooled.squeeze(1), dim=-1)                                 # (B,d)

    def embed_pair(self, pair):
        """pair (B,2,22,3,3), A then B -> (B,d), length 1."""
        a = self.encode_pose(pair[:, 0])                                              # (B,d,40)
        b = self.encode_pose(pair[:, 1])                                              # (B,d,40)
        fused = self.pair_encoder(torch.cat([a, b], 1))                               # (B,d,40)
        pooled = self.pool(fused.mT)                                                  # (B,1,d)
        return F.normalize(pooled.squeeze(1), dim=-1)                                 # (B,d)

    def embed_text(self, ids, mask):
        """ids (B,T) long, mask (B,T) True on words, padding on the right -> (B,d), length 1."""
        lengths = mask.sum(1).clamp(min=1).cpu()
        words = self.text_input(self.word_embedding(ids))                             # (B,T,d)
        packed = nn.utils.rnn.pack_padded_sequence(words, lengths, True, enforce_sorted=False)
        _, last = self.gru(packed, self.gru_state.expand(-1, len(ids), -1).contiguous())
        both_directions = torch.cat([last[0], last[1]], -1)                           # (B,2d)
        return F.normalize(self.text_output(both_directions), dim=-1)                 # (B,d)

    def forward(self, pose, ids, mask):
        """pose (B,22,3,3), or pairs (B,2,22,3,3), with their texts -> loss, {"top1", "scale"}.

        Cross-entropy on scaled cosines in both directions: of B texts the own one must win, and of
        B poses.
        """
        embed = self.embed_pair if pose.dim() == 5 else self.embed_pose
        similarity = self.scale * embed(pose) @ self.embed_text(ids, mask).T          # (B,B)
        own = torch.arange(len(pose), device=pose.device)
        loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        top1 = (similarity.argmax(1) == own).float().mean()
        return loss, {"top1": top1, "scale": self.scale.detach()}


def tokenize_texts(text_tokenizer, texts, limit=196):
    """Texts -> ids (B,T) and mask (B,T) for `Retrieval.embed_text`. text_tokenizer: the Hugging
    Face one of the model."""
    rows = [text_tokenizer(text, add_special_tokens=False).input_ids[:limit] for text in texts]
    lengths = [len(row) for row in rows]
    longest = max(1, *lengths)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return ids, mask


def load_retrieval_model(folder, device="cpu"):
    """The retrieval model that travels in a weights folder, or None where none was trained. Raises
    UserError."""
    config = read_config(folder).get("retrieval")
    if not config:
        return None

    path = pathlib.Path(folder) / "model.safetensors"
    state = {}
    for name, tensor in read_tensors(path).items():
        if name.startswith(RETRIEVAL_PREFIX):
            state[name.removeprefix(RETRIEVAL_PREFIX)] = tensor

    # on the meta device sizes that do not fit the file cost no memory, and no random numbers
    with torch.device("meta"):
        model = Retrieval(**config)
    load_strictly(model, state, path)
    return model.to(device).eval()


# ---- 6. What is asked, and what is true ----------------------------------------------------------
# Of so many questions the last calls for a fixed sentence; shares as in training
SAME_EVERY = 33                          # pairs: of a person and itself, in whom nothing changes
ABSENT_EVERY = 10                        # questions about a group: nobody fits


class EvalSet:
    """n questions of one task over the first 2n people of a world, where every two make a pair.

    Question k is about person 2k, about the way from it to its partner, or about one person of a
    group of 2, 3 or 4.

    poses (n,22,3,3): ground truth, in the frame of the answer; sources (n,22,3,3): pose A of the
    pair tasks, else None; texts: n true texts about these poses, whatever was asked; views: the
    sides that image captions can name; rows: the people that the answers are about; groups: the
    Groups that are asked about, or []; target: "pose" | "text"; want: the same, or None where the
    model must find out which.
    negative (n,) bool: the questions that call for a fixed sentence, `negative_text`, because two
    poses are the same or nobody fits; kept: a list of all the others.
    """

    def __init__(self, world, task, n, seed=0):
        row = TASKS[task]
        self.world = world
        self.task = task
        self.target = row.target
        self.want = want_of(task)
        self.seed = seed

        self.negative = torch.zeros(n, dtype=torch.bool)
        self.negative_text = NOBODY if row.group else to_text([], None, demand=True)
        if row.group:
            self.negative[ABSENT_EVERY - 1::ABSENT_EVERY] = True
        elif row.pair and row.target == "text" and not row.turn:
            self.negative[SAME_EVERY - 1::SAME_EVERY] = True
        self.kept = (~self.negative).nonzero().flatten().tolist()

        starts = 2 * torch.arange(n)  # person A, or the only one
        self.groups = [world.group_of(2 * k) for k in range(n)] if row.group else []
        rows = []
        self.texts = []
        for k in range(n):
            person, text = self.truth(k)
            rows.append(person)
            self.texts.append(text)

        self.rows = torch.tensor(rows)
        self.poses = world.poses[self.rows]
        self.sources = world.poses[starts] if row.pair else None
        self.views = [""] * n
        if "image" in row.inputs and row.target == "text" and not row.pair:
            self.views = [world.views[i] for i in self.rows]

        self.body_to_answer = torch.eye(3).expand(n, 3, 3)
        if row.frame == "camera":
            body_poses = self.poses
            self.poses = world.camera_poses[self.rows]
            self.body_to_answer = self.poses[:, 0] @ body_poses[:, 0].mT

    def rng(self, k):
        """The generator that words the k-th text."""
        return np.random.default_rng((self.seed, k))

    def truth(self, k):
        """The person that the k-th answer is about, and a true text about the answer.

        Where nobody fits, somebody of the group stands in, whom no metric looks at.
        """
        negative = bool(self.negative[k])
        rng = self.rng(k)
        if self.groups:
            group = self.groups[k]
            asked = self.world.question(group, rng, self.target, absent=negative)
            person = group.people[asked.person]
            if negative:
                return person, NOBODY
            if self.target == "text":
                return person, self.world.image_caption(person, rng)
            return person, self.world.caption(person, rng)

        person = self.world.subjects(self.task, 2 * k, negative)[-1]
        if self.task in ("request", "speculate"):
            return person, self.world.caption(person, rng)
        return person, self.world.text(self.task, 2 * k, rng, same=negative)

    @functools.cached_property
    def requests(self):
        """The Requests whose texts the prompts of the task `request` are."""
        return [self.world.ask(i, self.rng(k)) for k, i in enumerate(self.rows.tolist())]

    def inputs(self, k):
        """What the k-th question gives: texts, pictures (S,S,3) and poses (22,3,3)."""
        negative = bool(self.negative[k])
        *inputs, _ = self.world.example(self.task, 2 * k, self.rng(k), same=negative)
        if self.task == "image_text2pose":
            inputs[0], _ = self.hidden_photos[k]
        return inputs

    def question(self, k, model=None, first=None):
        """The k-th prompt, in the plain wording that `model` was trained on.

        first: see `past_turns`.
        """
        return [*self.past_turns(k, model, first), *question(self.task, self.inputs(k), model)]

    def past_turns(self, k, model=None, first=None):
        """The turns before the k-th question: [] but in a conversation.

        The first makes a pose from its caption: person 2k, to be edited and compared. A description
        comes after an edit that has led to it, or else the caption would tell it. The answers are
        true; first: a pose (22,3,3) in place of that of the first turn, or None.
        """
        if not TASKS[self.task].turn:
            return []
        start = 2 * k + 1 if self.task == "chat_describe" else 2 * k
        past = ["text2pose"] if self.task == "chat_edit" else ["text2pose", "chat_edit"]

        turns = []
        for task in past:
            *inputs, answer = self.world.example(task, start, self.rng(k))
            if first is not None and task == "text2pose":
                answer = first
            segments = [*question(task, inputs, model), ("pose", answer, True)]
            turns.append(("turn", segments, False))
        return turns

    @functools.cached_property
    def hidden_photos(self):
        """Of each question (picture, hidden): a photograph in which an object hides a part of the
        person, each of HIDDEN_PARTS in turn, and which joints it hides (22,) bool."""
        photos = []
        for k, i in enumerate(self.rows.tolist()):
            part = HIDDEN_PARTS[k % len(HIDDEN_PARTS)]
            photos.append(self.world.hidden_photo(i, part))
        return photos

    def facing_front(self, poses):
        """Poses (n,22,3,3) in the frame of the answer, turned back to face +z, where statements are
        defined."""
        return turn_root(poses, self.body_to_answer.mT)


def as_poses(answers):
    """Poses (22,3,3), with texts among them -> (n,22,3,3): the pose at rest stands in for a text.
    """
    rest = torch.eye(3).expand(22, 3, 3)
    poses = [rest if isinstance(answer, str) else answer for answer in answers]
    return torch.stack(poses)


class Evaluator(NamedTuple):
    """Computes the metrics of answers. body: whose joints are measured; retrieval_model: a
    Retrieval or None; text_tokenizer: the Hugging Face tokenizer of the model."""
    body: object
    retrieval_model: object
    text_tokenizer: object

    def metrics(self, evalset, answers):
        """answers: n poses (22,3,3) or n texts, as the task asks -> {metric: value}.

        A text in place of a pose counts as the pose at rest, and in no_pose. Questions that call
        for a fixed sentence count in `negative_metrics` only.
        """
        if evalset.target == "text":
            metrics = self.text_metrics(evalset, answers)
        else:
            metrics = self.pose_metrics(evalset, answers)
        return metrics | self.negative_metrics(evalset, answers)

    def text_metrics(self, evalset, texts):
        """Metrics of n generated texts -> {metric: value}."""
        kept = evalset.kept
        if evalset.groups:
            texts = [drop_introduction(text) for text in texts]
        pred = [texts[k] for k in kept]
        target = [evalset.texts[k] for k in kept]
        views = [evalset.views[k] for k in kept]
        sources = None if evalset.sources is None else evalset.sources[kept]
        metrics = {
            "bleu4": bleu4(pred, target),
            "rouge_l": rouge_l(pred, target),
            **text_statement_metrics(pred, target, evalset.poses[kept], sources),
            **view_metrics(pred, views),
            **self.retrieval_metrics(evalset, evalset.poses, texts),
        }
        if evalset.groups:
            codes = evalset.world.codes
            told = []
            for text, group in zip(texts, evalset.groups):
                told.append(truest_of(text, codes, group.people))
            metrics |= self.person_metrics(evalset, told)
        return metrics

    def pose_metrics(self, evalset, answers):
        """Metrics of n generated poses (22,3,3), or texts in their place -> {metric: value}."""
        kept = evalset.kept
        poses = as_poses(answers)                                                     # (n,22,3,3)
        front = evalset.facing_front(poses)                                           # (n,22,3,3)
        joints = self.body.joints(poses)                                              # (n,22,3)
        target = self.body.joints(evalset.poses)                                      # (n,22,3)
        texts = [evalset.texts[k] for k in kept]
        sources = None if evalset.sources is None else evalset.sources[kept]
        metrics = {
            "mpjpe": mpjpe(joints, target)[kept].mean().item(),
            "pa_mpjpe": pa_mpjpe(joints, target)[kept].mean().item(),
            "mpjre": mpjre(poses, evalset.poses)[kept].mean().item(),
            "no_pose": sum(isinstance(answers[k], str) for k in kept),
            **pose_statement_metrics(texts, front[kept], sources),
            **self.retrieval_metrics(evalset, poses, evalset.texts),
        }
        if evalset.groups:
            metrics |= self.person_metrics(evalset, self.nearest_people(evalset, answers))
        if evalset.task == "image_text2pose":
            metrics["hidden_mpjpe"] = self.hidden_error(evalset, poses)
        if evalset.task == "request":
            metrics |= request_metrics(evalset.requests, front)
        if evalset.task == "speculate":
            asked = [evalset.world.activity[i] for i in evalset.rows]
            is_right = [name == other for name, other in zip(asked, nearest_activities(front))]
            metrics["activity_accuracy"] = float(np.mean(is_right))
        return metrics

    def hidden_error(self, evalset, poses):
        """MPJPE (mm) of the joints that an object hides. All poses face front, each by its own
        heading: of a text alone it cannot be known."""
        hidden = torch.tensor(np.stack([mask for _, mask in evalset.hidden_photos]))  # (n,22)
        joints = self.body.joints(face_front(poses))                                  # (n,22,3)
        target = self.body.joints(face_front(evalset.poses))                          # (n,22,3)
        return joint_errors(joints, target)[hidden].mean().item()

    def nearest_people(self, evalset, answers):
        """Whose pose is nearest to each answer, of the people of its group; None for a text."""
        nearest = []
        for answer, group in zip(answers, evalset.groups):
            if isinstance(answer, str):
                nearest.append(None)
                continue
            people = self.body.joints(evalset.world.camera_poses[group.people])       # (m,22,3)
            joints = self.body.joints(answer[None]).expand_as(people)
            nearest.append(group.people[mpjpe(joints, people).argmin()])
        return nearest

    def person_metrics(self, evalset, people):
        """people: the person that each answer is about -> how often it is the one who was asked
        for, in all groups and in those of 2, of 3, of 4."""
        hits = {}
        for k in evalset.kept:
            size = len(evalset.groups[k].people)
            hits.setdefault(size, []).append(people[k] == int(evalset.rows[k]))

        metrics = {"right_person": float(np.mean(sum(hits.values(), [])))}
        for size in sorted(hits):
            metrics[f"right_person_of_{size}"] = float(np.mean(hits[size]))
        return metrics

    def negative_metrics(self, evalset, answers):
        """How often a fixed sentence is said -> {metric: value}; {} where no question calls for it.

        ..._recognised: share of the questions that call for it; ..._mistaken: share of the others.
        """
        if not evalset.negative.any():
            return {}
        said = np.array([says_only(evalset.negative_text, answer) for answer in answers])
        negative = evalset.negative.numpy()
        name = "nobody" if evalset.groups else "same"
        return {
            f"{name}_recognised": float(said[negative].mean()),
            f"{name}_mistaken": float(said[~negative].mean()),
        }

    @torch.no_grad()
    def retrieval_metrics(self, evalset, poses, texts):
        """Metrics of generated poses with true texts, or the reverse; {} without a retrieval model.

        r_precision: own answer among the best 1, 2, 3 of 32; recall_at: among the best 1, 5, 10, 20
        of all n; recall_back: the reverse, own question of an answer; matching: mean cosine; fid:
        between generated and true poses. The texts are captions or differences, which the retrieval
        model was trained on, even where the model was asked by other words.
        """
        if self.retrieval_model is None:
            return {}

        kept = evalset.kept
        ids, mask = tokenize_texts(self.text_tokenizer, texts)
        text_vectors = self.retrieval_model.embed_text(ids, mask)[kept]               # (n,d)
        pose_vectors = self.embed_poses(evalset, poses)[kept]                         # (n,d)
        if evalset.target == "text":
            return self.ranking_metrics(pose_vectors, text_vectors)
        fid = frechet(pose_vectors, self.embed_poses(evalset, evalset.poses)[kept])
        return {**self.ranking_metrics(text_vectors, pose_vectors), "fid": fid}

    def embed_poses(self, evalset, poses):
        """Poses (n,22,3,3) in the frame of the answer -> (n,d); those of a pair task together with
        their sources."""
        poses = evalset.facing_front(poses)
        if evalset.sources is None:
            return self.retrieval_model.embed_pose(poses)
        return self.retrieval_model.embed_pair(torch.stack([evalset.sources, poses], 1))

    def ranking_metrics(self, query, answer):
        """Unit vectors (n,d) of questions and of their answers -> {metric: value}."""
        return {
            "r_precision": r_precision(query, answer),
            "recall_at": recall_at(query, answer),
            "recall_back": recall_at(answer, query),
            "matching": (query * answer).sum(-1).mean().item(),
        }


# ---- 7. Baselines and upper bounds ---------------------------------------------------------------
def nearest_by_statements(texts, train_texts):
    """For each text the index of the training text whose statements are most alike: cosine of
    statement sets."""
    said = [dict.fromkeys(statements(text)) for text in [*train_texts, *texts]]
    column = {}
    for row in said:
        for statement in row:
            column.setdefault(statement, len(column))

    bags = torch.zeros(len(said), len(column))                              # (train+n,statements)
    for bag, row in zip(bags, said):
        bag[[column[statement] for statement in row]] = 1
    bags = F.normalize(bags)

    train_bags = bags[:len(train_texts)]
    return (bags[len(train_texts):] @ train_bags.T).argmax(1)


@torch.no_grad()
def image_features(evalset, vision):
    """The frozen eyes' features of each photograph of an EvalSet, averaged over its patches ->
    (n,Dv)."""
    rows = evalset.rows.tolist()
    features = []
    for start in progress_bar(range(0, len(rows), 32), f"{evalset.task}: frozen features"):
        pictures = [evalset.world.image(i) for i in rows[start:start + 32]]
        features.append(vision(pictures).mean(1).cpu())                               # (32,Dv)
    return torch.cat(features)


def nearest_by_features(evalset, train_set, vision):
    """For each photograph of `evalset` the index of the photograph of `train_set` most alike to the
    frozen eyes."""
    train_features = image_features(train_set, vision)                                # (train,Dv)
    features = image_features(evalset, vision)                                        # (n,Dv)

    # what all photographs share would drown what sets them apart
    mean = train_features.mean(0)
    std = train_features.std(0) + 1e-6
    train_features = F.normalize((train_features - mean) / std, dim=1)
    features = F.normalize((features - mean) / std, dim=1)
    return (features @ train_features.T).argmax(1)


def baselines(evalset, train_set, model, seed):
    """name -> answers that need no language model, taken from the people of `train_set`."""
    row = TASKS[evalset.task]
    rng = np.random.default_rng(seed)
    copied = {}  # name -> whose answer is copied
    if row.target == "text":
        copied["random_caption"] = rng.choice(train_set.kept, size=len(evalset.texts))
    if row.inputs == ("text",) and row.text == "caption":
        copied["nearest_caption"] = nearest_by_statements(evalset.texts, train_set.texts)
    if row.inputs == ("image",):
        copied["nearest_feature"] = nearest_by_features(evalset, train_set, model.vision)

    answers = {}
    if row.target == "pose":
        mean = train_set.poses[train_set.kept].mean(0)
        answers["mean_pose"] = project_rotation(mean).expand_as(evalset.poses)
    for name, rows in copied.items():
        if row.target == "pose":
            answers[name] = train_set.poses[rows]
        else:
            answers[name] = [train_set.texts[k] for k in rows]
    if row.target == "pose" and row.pair:
        answers["input_pose"] = evalset.sources
    if row.group:
        answers["random_person"] = random_people(evalset, rng)
    return answers


def random_people(evalset, rng):
    """For each question about a group the answer about any person of it: what chance scores."""
    people = [int(rng.choice(group.people)) for group in evalset.groups]
    if evalset.target == "pose":
        return evalset.world.camera_poses[people]
    return [evalset.world.image_caption(i, rng) for i in people]


@torch.no_grad()
def round_trip(model, poses):
    """Poses (n,22,3,3) -> their codes (n,N), and the poses decoded from them (n,22,3,3)."""
    codes = model.pose_tokenizer.encode(poses.to(model.device))
    return codes.cpu(), model.pose_tokenizer.decode(codes).cpu()


def upper_bounds(evalset, model, seed):
    """name -> answers that no model of pose tokens can beat: the truth, and the truth through the
    tokenizer, where the model has one.

    For texts: another true text with another seed, which is the BLEU and the recall of a perfect
    model.
    """
    bounds = {}
    if model.has_codes:
        _, bounds["tokenizer"] = round_trip(model, evalset.poses)
    bounds["ground_truth"] = evalset.poses

    for name, answers in bounds.items():
        if evalset.target == "text":
            plain = true_texts(answers, evalset.sources, seed + 1)
            answers = [add_view(view, text) for view, text in zip(evalset.views, plain)]
        bounds[name] = list(answers)
        for k in evalset.negative.nonzero().flatten().tolist():
            bounds[name][k] = evalset.negative_text
    return bounds


# ---- 8. The whole report -------------------------------------------------------------------------
def answer_all(model, n, prompt, want, decode, batch, name):
    """The model's answers to prompts 0 to n - 1: a list of poses (22,3,3) and texts.

    prompt: a function of the number; want: see `generate`. A model that writes poses as text, or
    may choose what it answers, can give a text where a pose was hoped for.
    """
    answers = []
    for start in progress_bar(range(0, n, batch), f"{name}: {decode}"):
        prompts = [prompt(k) for k in range(start, min(start + batch, n))]
        answers += generate(model, prompts, [want] * len(prompts), decode=decode)
    return [answer.value for answer in answers]


def variants(model, evalset, decode, batch):
    """name -> the model's poses where the same is asked otherwise; {} for most tasks.

    image_text2pose: by the picture alone, and by the text alone, from which follows a pose that
    faces front: the true heading turns it to the camera. chat_edit: the edit alone, which is not
    about an earlier turn, and behind a first turn that the model has answered itself.
    """
    def ask(name, prompt):
        return answer_all(
            model, len(evalset.texts), prompt, "pose", decode, batch, f"{evalset.task}, {name}")

    def text_alone(k):
        return question("text2pose", [evalset.texts[k]], model)

    def image_alone(k):
        picture, _ = evalset.hidden_photos[k]
        return question("image2pose", [picture], model)

    def edit_alone(k):
        return question("edit", [evalset.sources[k], evalset.texts[k]], model)

    def first_turn(k):
        [(_, segments, _)] = evalset.past_turns(k, model)
        return segments[:-1]  # without its answer

    answers = {}
    if evalset.task == "image_text2pose":
        answers["image_alone"] = ask("image alone", image_alone)
        front = as_poses(ask("text alone", text_alone))
        answers["text_alone"] = turn_root(front, evalset.body_to_answer)
    if evalset.task == "chat_edit":
        if model.has_codes:
            answers["edit_alone"] = ask("edit alone", edit_alone)
        own = as_poses(ask("first turn", first_turn))
        answers["own_turn"] = ask(
            "own turn", lambda k: evalset.question(k, model, first=own[k]))
    return answers


def evaluate_task(model, evaluator, evalset, train_set, decodings, batch, seed):
    """One task -> its metrics by the first decoding that affects it; the others stand under
    "decoding"."""
    if evalset.target == "text":
        decodings = [decode for decode in decodings if decode not in AVERAGED] or ["argmax"]

    metrics = {}
    prompt = functools.partial(evalset.question, model=model)
    for decode in decodings:
        answers = answer_all(
            model, len(evalset.texts), prompt, evalset.want, decode, batch, evalset.task)
        metrics[decode] = evaluator.metrics(evalset, answers)

    first, *others = decodings
    report = {**metrics[first], "decode": first}
    if others:
        report["decoding"] = {decode: metrics[decode] for decode in others}
    compared = {
        "variants": variants(model, evalset, first, batch),
        "baselines": baselines(evalset, train_set, model, seed),
        "ceilings": upper_bounds(evalset, model, seed),
    }
    for group, answers_by_name in compared.items():
        report[group] = {}
        for name, answers in answers_by_name.items():
            report[group][name] = evaluator.metrics(evalset, answers)
    return report


def evaluate_tokenizer(model, evaluator, evalset):
    """The pose tokenizer alone: reconstruction error, statement accuracy and codebook usage."""
    codes, decoded = round_trip(model, evalset.poses)
    metrics = evaluator.metrics(evalset, decoded)
    counts = torch.bincount(codes.flatten(), minlength=model.pose_tokenizer.config.codes)
    usage = counts.double() / codes.numel()                                           # (K,)
    return {
        "mpjpe": metrics["mpjpe"],
        "pa_mpjpe": metrics["pa_mpjpe"],
        "mpjre": metrics["mpjre"],
        "active": (usage > 0).double().mean().item(),
        "perplexity": torch.special.entr(usage).sum().exp().item(),
        "statements_kept": metrics["statement_accuracy"],
        "statements_kept_exact": metrics["statement_accuracy_exact"],
    }


def evaluate(model, evaluator, tasks=tuple(TASKS), split="test", n=512, decode="argmax",
             batch=32, pool=1024, seed=0):
    """Every figure of a model as a JSON-able dict: millimetres and fractions.

    n questions a task from the first 2n people of `split`; the baselines may look at `pool` people
    of the train split. decode: one decoding, or several separated by commas; the first gives a
    task's own figures.
    """
    size = model.vision.clip_size
    world = World(split, max(2 * n, POOL), size)  # a group needs POOL people
    train_world = World("train", max(2 * pool, POOL), size)

    report = {
        "size": model.config["size"],
        "pose_head": model.config["pose_head"],
        "seed": seed,
        "split": split,
        "n": n,
        "body": evaluator.body.name,
        "decode": decode,
    }
    if model.has_codes:
        evalset = EvalSet(world, "text2pose", n, seed)
        report["tokenizer"] = evaluate_tokenizer(model, evaluator, evalset)
    report["tasks"] = {}
    for task in tasks:
        evalset = EvalSet(world, task, n, seed)
        train_set = EvalSet(train_world, task, pool, seed)
        report["tasks"][task] = evaluate_task(
            model, evaluator, evalset, train_set, decode.split(","), batch, seed)
    return report


def typical_failure(model, evalset, decode, batch, body):
    """Of one task the question whose answer 90 % are better than, as a row of `contact_sheet`."""
    answers = answer_all(
        model, len(evalset.texts), functools.partial(evalset.question, model=model), evalset.want,
        decode, batch, evalset.task)
    is_pose = evalset.target == "pose"
    targets = evalset.poses if is_pose else evalset.texts
    rated = []
    for k in evalset.kept:
        subjects = [evalset.poses[k]]
        if evalset.sources is not None:
            subjects.insert(0, evalset.sources[k])
        error, note = rate(evalset.task, answers[k], targets[k], subjects, body)
        rated.append((error, k, note))

    rated.sort()
    _, k, note = rated[int(0.9 * len(rated))]
    results = [("answer", answers[k]), ("target", targets[k])]
    return sheet_row(evalset.task, note, evalset.inputs(k), results, body)


PROTOCOL = """\
{weights} ({size}): {split} split, {n} questions a task, plain templates, body {body}, seed {seed}
MPJPE in mm: 22 joints, pelvis at the origin, no alignment; PA: after the best similarity transform
MPJRE in degrees: mean angle between the rotations of 22 joints, the root among them, no alignment
true: share of statements within the tolerance of the captions; exactly: without it
recall, F1: of statements; same: share of pairs of equal poses that are told to be equal
- baselines to beat, + upper bounds
"""
COLUMNS = {  # heading -> the metric of a generated pose, of a text, of the tokenizer
    "MPJPE": ["mpjpe"],
    "PA": ["pa_mpjpe"],
    "MPJRE": ["mpjre"],
    "true": ["statement_accuracy", "precision", "statements_kept"],
    "exactly": ["statement_accuracy_exact", "precision_exact", "statements_kept_exact"],
    "recall": ["recall"],
    "F1": ["f1"],
    "view": ["view_accuracy"],
    "same": ["same_recognised"],
    "BLEU-4": ["bleu4"],
    "ROUGE-L": ["rouge_l"],
    "R@1/32": ["r_precision"],
    "FID": ["fid"],
}
THOUGHT_PROTOCOL = """
person: share of answers that are nearest to the person asked for, by MPJPE or by statements; of 2,
of 3, of 4: in groups of so many; nobody: share of questions which nobody fits that are told so;
wrongly: of all others; hidden: MPJPE of the joints that an object hides, all poses facing front;
action: share of poses of the activity that was asked for, judged by the nearest other person,
chance {chance:.3f}; facts: share of what the requests say that the poses show; all: share of the
requests whose poses show all of it
R@10: own answer among the best 10 of all for a question, back: own question for an answer
"""
THOUGHT_COLUMNS = {  # the same of the tasks that ask for thought
    "person": ["right_person"],
    **{f"of {size}": [f"right_person_of_{size}"] for size in PLACES},
    "nobody": ["nobody_recognised"],
    "wrongly": ["nobody_mistaken"],
    "hidden": ["hidden_mpjpe"],
    "action": ["activity_accuracy"],
    "facts": ["facts_shown"],
    "all": ["requests_shown"],
    "R@10": ["recall_at"],
    "back": ["recall_back"],
}
IN_UNITS = ("MPJPE", "PA", "MPJRE", "hidden")  # mm and degrees, shown with one digit
RANKS = {"R@10": 2, "back": 2}                 # which figure of a list is shown, if not the first


SYSTEMS = {"codes": "UniPose", "mlp": "ChatPose", "text": "in words"}  # pose head -> whose it is


def format_cell(heading, names, metrics):
    """The value of one column, 8 characters wide; blank where a row has none."""
    for name in names:
        value = metrics.get(name)
        if isinstance(value, list):
            value = value[RANKS.get(heading, 0)] if value else None
        if value is not None:
            digits = 1 if heading in IN_UNITS else 3
            return f"{value:>8.{digits}f}"
    return " " * 8


def task_rows(report, tasks):
    """For each task the model, then what it is compared with -> [(task, name, metrics), ...]."""
    rows = []
    system = SYSTEMS[report["pose_head"]]
    groups = {"decoding": system, "variants": system, "baselines": "-", "ceilings": "+"}
    for task in tasks:
        metrics = report["tasks"][task]
        rows.append((task, f"{system} {metrics['decode']}", metrics))
        for group, mark in groups.items():
            for name, group_metrics in metrics.get(group, {}).items():
                rows.append(("", f"{mark} {name}", group_metrics))
    return rows


def format_rows(rows, columns):
    """Rows [(task, name, metrics), ...] as aligned lines, below the headings of their columns."""
    width = max(12, *[len(task) + 1 for task, _, _ in rows])
    lines = [" " * (width + 22) + "".join(f"{heading:>8}" for heading in columns)]
    for task, name, metrics in rows:
        cells = [format_cell(heading, names, metrics) for heading, names in columns.items()]
        lines.append(f"{task:<{width}}{name:<22}" + "".join(cells))
    return lines


def format_table(report):
    """The report as aligned lines; the tasks that ask for thought have a second table."""
    rows = task_rows(report, report["tasks"])
    if "tokenizer" in report:
        tokenizer = report["tokenizer"]
        rows.insert(0, ("tokenizer", f"{tokenizer['active']:.0%} codes active", tokenizer))
    lines = format_rows(rows, COLUMNS)

    columns = {}
    shown = []
    for row in task_rows(report, [task for task in report["tasks"] if task not in SEVEN]):
        filled = [heading for heading, [name] in THOUGHT_COLUMNS.items() if name in row[2]]
        columns |= {heading: THOUGHT_COLUMNS[heading] for heading in filled}
        if filled:
            shown.append(row)
    if shown:
        chance = 1 / len(activity_table().activities)
        lines += [THOUGHT_PROTOCOL.format(chance=chance), *format_rows(shown, columns)]
    return lines


# ---- 9. How fast ---------------------------------------------------------------------------------
@torch.no_grad()
def pose_seconds(model, prompt, stepwise):
    """Seconds from a prompt that is in the cache to the N codes of a pose. prompt: a CachedModel,
    left unchanged.

    Parallel: <p>, N queries and </p> go through in one step. Stepwise: <p>, then every code before
    the next one.
    """
    vocab = model.vocab
    n = model.pose_tokenizer.n_tokens
    code_head = model.llm.lm_head.weight[vocab.pose0:vocab.p_open]                    # (K,D)
    cached = copy.copy(prompt)
    cached.cache = copy.deepcopy(prompt.cache)

    def read(row):
        """Reads a Row -> the best code after each of its tokens, a list; this waits for a GPU."""
        hidden = cached.read(collate([row]))                                          # (1,q,D)
        return (hidden[0] @ code_head.T).argmax(-1).tolist()

    start = time.perf_counter()
    if stepwise:
        token = vocab.p_open
        for index in range(-1, n - 1):  # <p> stands before code 0
            row = Row()
            row.add(token, code_index=index)
            [code] = read(row)
            token = vocab.pose0 + code
    else:
        row = Row()
        row.add(vocab.p_open)
        for query in range(vocab.query0, vocab.query0 + n):
            row.add(query, block=0)
        row.add(vocab.p_close)
        read(row)
    return time.perf_counter() - start


def median_ms(repeats, **runs):
    """name=function that returns its seconds -> {name: median milliseconds}. Runs take turns, so
    noise hits all alike."""
    seconds = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            elapsed = run()
            if repeat > 0:  # the first round warms up
                seconds[name].append(elapsed)
    return {name: 1000 * float(np.median(values)) for name, values in seconds.items()}


def copy_speed(device, size=1 << 28):
    """Bytes a second that this machine copies at best, read and written counted. No step of an LLM
    is faster than reading its weights once."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    fastest = math.inf
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for a GPU
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size / fastest


def peak_memory(device):
    """Bytes at most held so far: on a GPU by tensors, on a CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def most_tokens(model, target, decode="argmax"):
    """How many tokens an answer may have: an untrained model does not know when to stop."""
    if target == "text":
        return 160
    one_by_one = decode == "ar" or model.config["attn"] == "causal"
    if one_by_one or model.config["pose_head"] == "text":
        return model.pose_length + 3  # <p>, its codes or words, </p> and </s>
    return 3


def measure_speed(model, seed=0, repeats=7):
    """Milliseconds: a pose in one step against one by one, from the same cached prompt, and the
    latency of every task that the model has learned. A model without codes has its latencies only.
    """
    world = World("test", POOL, model.vision.clip_size)  # a group needs so many people
    tasks, _ = trained_tasks(model.stages, model.config["pose_head"])
    evalsets = {task: EvalSet(world, task, 1, seed) for task in tasks}

    row = model.encode(evalsets["text2pose"].question(0, model))
    prompt = CachedModel(model, 1)
    with torch.no_grad():
        prompt.read(collate([row]))

    def answer_seconds(task, decode="argmax"):
        target = evalsets[task].target
        max_new = most_tokens(model, target, decode)
        prompts = [evalsets[task].question(0, model)]
        start = time.perf_counter()
        generate(model, prompts, [target], decode=decode, max_new=max_new)
        return time.perf_counter() - start

    times = {}
    if model.has_codes:
        pose_ms = median_ms(
            repeats,
            parallel=lambda: pose_seconds(model, prompt, stepwise=False),
            one_by_one=lambda: pose_seconds(model, prompt, stepwise=True),
        )
        answer_ms = median_ms(
            repeats,
            parallel=lambda: answer_seconds("text2pose"),
            one_by_one=lambda: answer_seconds("text2pose", "ar"),
        )
        times = {
            "pose_ms": pose_ms,
            "pose_ratio": pose_ms["one_by_one"] / pose_ms["parallel"],
            "answer_ms": answer_ms,
            "answer_ratio": answer_ms["one_by_one"] / answer_ms["parallel"],
        }
    per_task = {task: functools.partial(answer_seconds, task) for task in tasks}
    latency_ms = median_ms(repeats, **per_task)

    read_each_step = [*model.llm.model.layers.parameters(), model.llm.lm_head.weight]
    llm_bytes = sum(parameter.numel() * parameter.element_size() for parameter in read_each_step)
    bytes_per_s = copy_speed(model.device)
    return {
        "prompt_tokens": len(row.ids),
        "pose_tokens": model.vocab.n_tokens,
        "latency_ms": latency_ms,
        "llm_gb": llm_bytes / 1e9,
        "copy_gb_per_s": bytes_per_s / 1e9,
        "read_once_ms": 1000 * llm_bytes / bytes_per_s,
        "peak_memory_gb": peak_memory(model.device) / 1e9,
        **times,
    }


def format_speed(figures):
    """The speed report as lines."""
    lines = [
        "{pose_tokens} codes a pose, {prompt_tokens} tokens before it, median ms".format(**figures),
        f"{'':<36}{'parallel':>10}{'one by one':>12}{'ratio':>8}",
    ]
    labels = {
        "pose": "the pose, from the cached prompt",
        "answer": "the whole answer, prompt included",
    }
    if "pose_ms" not in figures:  # of a model without codes
        labels = {}
        lines = ["{prompt_tokens} tokens before an answer, median ms".format(**figures)]
    for key, label in labels.items():
        times = figures[f"{key}_ms"]
        ratio = figures[f"{key}_ratio"]
        lines.append(f"{label:<36}{times['parallel']:>10.1f}{times['one_by_one']:>12.1f}{ratio:>7.1f}x")

    lines.append(
        "the LLM is {llm_gb:.2f} GB: {read_once_ms:.1f} ms to read once at {copy_gb_per_s:.0f} "
        "GB/s, measured by copying; peak memory {peak_memory_gb:.1f} GB".format(**figures))
    latencies = [f"{task} {ms:.0f}" for task, ms in figures["latency_ms"].items()]
    lines.append("latency of one answer: " + ", ".join(latencies))
    return lines


# ---- 10. How time and memory grow ----------------------------------------------------------------
class Curve(NamedTuple):
    """What grows. run(size) does the work; reason: why its time is no straight line, if so."""
    name: str
    sizes: tuple
    run: object
    reason: str


STRAIGHT = 0.15  # times that are no further off a line than this are called straight
BATCH = "a small batch waits for the weights as one row does, a large one for memory of the system"
PROMPT = "each token attends to all before it, so a long prompt costs more a token"


def growth_curves(model, seed=0):
    """The curves of `python eval.py --speed`: one question, or training example, many times over.
    """
    world = World("test", 2, model.vision.clip_size)
    poses = World("test", 2048).poses
    picture = world.image(0)
    prompts = {}
    for task in ("text2pose", "pose2text"):
        prompts[task] = EvalSet(world, task, 1, seed).question(0, model)
    _, example = Mixture(["text2pose"], seed, world)[0]
    row = model.encode(example)
    pattern = trainable("align", model.config["size"], model.config["lora_r"])
    learning = [p for name, p in model.named_parameters() if re.match(pattern, name)]

    def answer_poses(prompt, n=1):
        max_new = most_tokens(model, "pose")
        generate(model, [prompt] * n, ["pose"] * n, max_new=max_new)

    def answer_texts(n):
        generate(model, [prompts["pose2text"]] * n, ["text"] * n, max_new=32)

    def read_words(n):
        answer_poses([("text", "left " * n, False)])

    def read_pictures(n):
        answer_poses([("image", picture, False)] * n)

    def train(n):
        loss, _ = model(collate([row] * n))
        gradients = torch.autograd.grad(loss, learning)
        gradients[-1].flatten()[0].item()  # waits for a GPU

    def write_captions(n):
        true_texts(poses[:n], None, seed)

    batches = (1, 2, 4, 8, 16, 32, 64)
    answer_questions = functools.partial(answer_poses, prompts["text2pose"])
    return [
        Curve("text2pose: questions in a batch", batches, answer_questions, BATCH),
        Curve("pose2text: the same, 32 tokens", batches, answer_texts, BATCH),
        Curve("words in the prompt of a pose", (16, 64, 256, 512, 896), read_words, PROMPT),
        Curve("pictures in the prompt of a pose", (1, 2, 4, 8), read_pictures, PROMPT),
        Curve("examples in a training step", (1, 2, 4, 8, 16), train, BATCH),
        Curve("captions", (64, 256, 1024, 2048), write_captions,
              "every caption costs the same, so other programs must have taken time"),
    ]


def resident_bytes(entry):
    """An entry of Linux about the memory of this process: VmRSS, now, or VmHWM, at most."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return 1024 * int(line.split()[1])


def peak_increase(device, run):
    """Bytes that a call holds at most beyond what was held before: on a GPU in tensors, on a CPU in
    the whole process. None where the system does not tell; Linux does."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory, used again, would not be seen
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        run()
        return None
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def straight_line(sizes, values):
    """The line fixed + each * size nearest to values, by relative error -> fixed, each, off: the
    largest relative error."""
    sizes = np.array(sizes)
    values = np.array(values)
    each, fixed = np.polyfit(sizes, values, 1, w=1 / values)
    off = np.abs((fixed + each * sizes) / values - 1).max()
    return float(fixed), float(each), float(off)


def measure_growth(device, curves, repeats=3):
    """{name: median milliseconds and peak memory for each size, and the line through the times}.

    A curve ends where the memory does.
    """
    def seconds(run, size):
        start = time.perf_counter()
        run(size)
        return time.perf_counter() - start

    growth = {}
    for curve in progress_bar(curves, "growth"):
        megabytes = []
        try:
            curve.run(curve.sizes[0])  # what is loaded once does not grow
            for size in curve.sizes:
                peak = peak_increase(device, functools.partial(curve.run, size))
                megabytes.append(None if peak is None else peak / 1e6)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()

        sizes = curve.sizes[:len(megabytes)]
        runs = {str(size): functools.partial(seconds, curve.run, size) for size in sizes}
        ms = list(median_ms(repeats, **runs).values())
        figures = {"sizes": sizes, "ms": ms, "megabytes": megabytes, "reason": ""}
        if len(sizes) > 2:
            fixed, each, off = straight_line(sizes, ms)
            figures |= {"fixed_ms": fixed, "each_ms": each, "off": off}
            figures["reason"] = curve.reason if off > STRAIGHT else ""
        growth[curve.name] = figures
    return growth


def format_growth(growth):
    """The growth report as lines: for each curve its times, its memory, and how straight it is."""
    lines = ["how time and memory grow: median ms, and MB at most beyond what was held before"]
    for name, figures in growth.items():
        rows = {
            name: figures["sizes"],
            "  ms": [f"{ms:.1f}" for ms in figures["ms"]],
            "  MB": ["-" if mb is None else f"{mb:.1f}" for mb in figures["megabytes"]],
        }
        for label, values in rows.items():
            lines.append(f"{label:<34}" + "".join(f"{value:>9}" for value in values))
        if figures["reason"]:
            lines.append("  no straight line, {off:.0%} off one: {reason}".format(**figures))
        elif "off" in figures:
            lines.append("  a straight line within {off:.0%}: {fixed_ms:.1f} ms and {each_ms:.3f} "
                         "ms each".format(**figures))
    return lines


# ---- 11. The command line ------------------------------------------------------------------------
@dataclass
class Config:
    """Measure a model on its embedded test split."""
    weights: str = TINY  # the folder of the model, or the official release's `cache`
    size: str = ""  # nano | tiny | paper: random weights of this size instead, for --speed
    split: str = "test"  # test | test_wide | val | train
    n: int = 512  # questions a task
    tasks: list[str] = field(default_factory=list)  # evaluate only this task
    decode: str = "argmax"  # argmax | soft | check | ar, several separated by commas
    batch: int = 32  # questions answered in one batch
    pool: int = 1024  # training people that the baselines may look at
    seed: int = 0  # seed of the captions
    device: str = ""  # cpu | cuda; empty: the GPU where there is one
    body: str = ""  # SMPL file whose joints are measured; empty: the free body
    json: str = ""  # write all figures to this file
    speed: bool = False  # measure time instead of quality
    failures: str = ""  # instead, draw the answer of each task that 90 % are better than (.png)
    features: str = ""  # write retrieval features of --poses here (.npy), for data.py --build
    poses: list[str] = field(default_factory=list)  # data set of --features, as in data.py


def random_model(size, seed, device):
    """A UniPose of random weights, created on its device in the types that `load` would choose."""
    torch.manual_seed(seed)
    text_tokenizer = word_tokenizer(vocabulary())
    if size == "paper":  # a head as large as the paper's, though few words are known
        extra = [f"word{i}" for i in range(PAPER_TEXT - len(text_tokenizer))]
        text_tokenizer = word_tokenizer([*vocabulary(), *extra])

    # created in their own type, or the paper's model would need 34 GB for a moment instead of 17
    usual = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype(size, device))
    try:
        with torch.device(device):
            model = UniPose(model_config(size), text_tokenizer).eval()
    finally:
        torch.set_default_dtype(usual)
    model.pose_tokenizer.float()
    return model


def validate(config):
    """Raises UserError for settings that cannot work."""
    decodings = config.decode.split(",")
    check_choice("size", config.size, ["", *SIZES])
    check_choice("split", config.split, ["test", "test_wide", "val", "train"])
    for task in config.tasks:
        check_choice("tasks", task, TASKS)
    for decode in decodings:
        check_choice("decode", decode, DECODINGS)
    if min(config.n, config.batch, config.pool) < 2:
        raise UserError("--n, --batch and --pool must be at least 2")
    if config.features and not config.poses:
        raise UserError("--features needs poses to compute them of: give --poses KIND:PATH")
    for flag in ("json", "failures", "features"):
        path = getattr(config, flag)
        if path:
            validate_writable(f"--{flag}", path)


def check_choice(flag, value, choices):
    """Raises UserError where a flag has a value that is not among its choices."""
    if value not in choices:
        raise UserError(f"--{flag} {value} is not one of {', '.join(filter(None, choices))}")


def require_task(task, stages, pose_head="codes"):
    """Raises UserError unless a model that has been through `stages` can answer a task.

    stages, pose_head: see `require_stages`.
    """
    inputs = TASKS[task].inputs
    require_stages(stages, "image" in inputs, pose_head, with_thought=task in REASONING)
    if "pose" in inputs:
        require_codes(pose_head)


def trained_tasks(stages, pose_head="codes"):
    """The tasks that a model which has been through `stages` can answer, and {why not: the others}.

    Raises UserError if not even its pose tokenizer can be measured. stages, pose_head: see
    `require_stages`.
    """
    if stages is not None and pose_head == "codes" and "tokenizer" not in stages:
        require_stages(stages, with_images=False)

    trained = []
    left_out = {}
    for task in TASKS:
        try:
            require_task(task, stages, pose_head)
            trained.append(task)
        except UserError as reason:
            left_out.setdefault(str(reason), []).append(task)
    return trained, left_out


@torch.no_grad()
def write_features(config, retrieval_model, device):
    """Writes the retrieval features (M,d) of the poses of --poses as .npy. Raises UserError."""
    if retrieval_model is None:
        size = read_config(config.weights)["size"]
        command = f"python train.py --stage retrieval --size {size} --out"
        raise UserError(f"{config.weights} has no retrieval model; train it: {command} "
                        f"{shlex.quote(config.weights)}")
    _, poses = records_with_pose(config.poses)
    retrieval_model.to(device)
    batches = face_front(poses).split(256)
    features = [retrieval_model.embed_pose(batch.to(device)).cpu() for batch in batches]

    with atomic_write(config.features) as path, open(path, "wb") as file:
        np.save(file, torch.cat(features).numpy())
    print(f"wrote the features of {len(poses)} poses to {config.features}")


def main(argv=None):
    """Prints one table of metrics, or of times."""
    config = cli(Config, argv)
    validate(config)
    device = find_device(config.device)
    body = load_body(config.body)
    tasks = config.tasks or list(TASKS)
    left_out = {}
    if config.size:
        model = random_model(config.size, config.seed, device)
        retrieval_model = None
    else:
        notes = read_config(config.weights)
        stages = notes.get("stages")
        pose_head = notes["pose_head"]
        if config.speed:
            require_stages(stages, True, pose_head)  # prompts grow by pictures, too
        for task in config.tasks:
            require_task(task, stages, pose_head)
        if not config.tasks and not config.features and not config.speed:
            tasks, left_out = trained_tasks(stages, pose_head)
        model = load(config.weights, device)
        retrieval_model = load_retrieval_model(config.weights)
    decodings = config.decode.split(",")
    validate_decoding(model, *decodings)

    if config.features:
        write_features(config, retrieval_model, device)
        return
    if config.failures:
        world = World(config.split, max(2 * config.n, POOL), model.vision.clip_size)
        rows = []
        for task in tasks:
            evalset = EvalSet(world, task, config.n, config.seed)
            rows.append(typical_failure(model, evalset, decodings[0], config.batch, body))
        save_png(contact_sheet(rows), config.failures)
        print(f"look at {config.failures}")
        return
    if config.speed:
        figures = measure_speed(model, config.seed)
        report = {"size": model.config["size"], "seed": config.seed, "speed": figures}
        lines = format_speed(figures)
        if config.size == "paper":
            lines.append("(the paper reports 200 ms in parallel, 2,500 one by one)")
        figures["growth"] = measure_growth(model.device, growth_curves(model, config.seed))
        lines += ["", *format_growth(figures["growth"])]
    else:
        evaluator = Evaluator(body, retrieval_model, model.text_tokenizer)
        report = evaluate(
            model, evaluator, tasks, config.split, config.n, config.decode, config.batch,
            config.pool, config.seed)
        name = f"random weights, seed {config.seed}" if config.size else config.weights
        lines = [PROTOCOL.format(weights=name, **report), *format_table(report)]
        lines += [f"not measured: {', '.join(names)}: {why}" for why, names in left_out.items()]

    print("\n".join(lines))
    if config.json:
        with atomic_write(config.json) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
