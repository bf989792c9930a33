"""How good, how fast: every number of this project comes from here.

A task is an exam. The model sees the question, and its answer is marked against the truth with plain retrieval models:

    made pose   MPJPE, PA-MPJPE        how far the joints are off                                   (mm)
                statements             how much of what the caption says is true of the made pose   (share)
    made text   precision              how much of what it says is true of the pose                 (share)
                recall                 how much of what the reference says it says too              (share)
                BLEU-4, ROUGE-L        how much it sounds like the reference                        (share)
    both        R-precision, FID       what a separately trained retrieval model thinks of it

A caption here is a list of statements that can be checked, so "is it true" needs no judge: `data.check` looks at the
joints. Beside each number stand a baseline (what must be beaten) and a ceiling (what cannot be):

    text2pose    mean pose . nearest caption . [ model ] . the tokenizer's own round trip . the truth itself

Letters: B batch, T words, J=22 joints, N pose tokens, d width of an embedding, n questions of an exam.

    python eval.py                                   # the shipped weights on the test split
    python eval.py --tasks text2pose --n 64 --decode argmax,soft --json out/eval.json
    python eval.py --speed                           # all N codes of a pose in one step, against one by one
"""
import copy
import functools
import json
import math
import pathlib
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from captions import (
    add_view, caption, check_statements, difference, paircodes, posecodes, statements, view_in,
)
from data import TASKS, World, records_with_pose, vocabulary
from sample import DECODINGS, CachedModel, generate, question, validate_decoding
from tokenizer import (
    TINY, Encoder, TokenizerConfig, UserError, atomic_write, cli, face_front, load_body,
    matrix_to_sixd, run_main, turn_root,
)
from unipose import (
    PAPER_TEXT, RETRIEVAL_PREFIX, SIZES, UniPose, find_device, load, load_strictly, model_config,
    read_config, read_tensors, word_tokenizer,
)


# ---- 1. Poses: how far the joints are off --------------------------------------------------------------------------
def mpjpe(made, truth):
    """Mean distance of the joints with both pelvises put at the origin, no rotation taken out.

    made, truth: (B,J,3) metres. Returns (B,) mm. The paper's text2pose figures average 52 joints, 30 of them rigid
    fingers, so they are not comparable joint for joint.
    """
    made, truth = made - made[:, :1], truth - truth[:, :1]
    return 1000 * (made - truth).norm(dim=-1).mean(-1)


def project_rotation(matrix):
    """The rotation nearest to any (...,3,3) matrix; of an average of rotations, their chordal mean."""
    u, _, vt = torch.linalg.svd(matrix)
    sign = torch.ones_like(matrix[..., 0])
    sign[..., 2] = torch.linalg.det(u @ vt).sign()         # a mirror image is not a turn: the weakest axis gives way
    return u @ (sign[..., None] * vt)


def similarity_align(made, truth):
    """The copy of `made` (B,J,3) that is turned, scaled and moved to lie closest to `truth` (Umeyama 1991). Float64."""
    made, truth = made.double(), truth.double()
    a, b = made - made.mean(1, keepdim=True), truth - truth.mean(1, keepdim=True)
    turned = a @ project_rotation(a.mT @ b)                                              # (B,J,3)
    scale = (turned * b).sum((1, 2)) / a.square().sum((1, 2)).clamp(min=1e-12)           # (B,)
    return scale[:, None, None] * turned + truth.mean(1, keepdim=True)


def pa_mpjpe(made, truth):
    """MPJPE after the best similarity per sample: the error of the pose alone. (B,J,3) metres -> (B,) mm."""
    return 1000 * (similarity_align(made, truth) - truth).norm(dim=-1).mean(-1)


# ---- 2. Texts: how much it sounds like the reference ---------------------------------------------------------------
PUNCTUATION = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|(?<=\d)-|[!-&(-+/:-@\[-`{-~]")     # "1.5", "half-bent" stay whole


def bleu_words(text):
    """The WMT `13a` tokenisation for plain ASCII: punctuation stands alone, case is kept."""
    return PUNCTUATION.sub(r" \g<0> ", text).split()


def bleu4(made, truth):
    """Corpus BLEU with 1- to 4-grams, one reference each, no smoothing (Papineni 2002). Two lists of str -> 0..1."""
    hits, total, longer = np.zeros(4), np.zeros(4), np.zeros(2)
    for a, b in zip(made, truth):
        a, b = bleu_words(a), bleu_words(b)
        longer += len(a), len(b)
        for n in range(4):
            grams_a, grams_b = (Counter(zip(*(words[k:] for k in range(n + 1)))) for words in (a, b))
            hits[n] += (grams_a & grams_b).total()
            total[n] += grams_a.total()
    if not hits.all():                                     # one order without a single hit: the geometric mean is 0
        return 0.0
    brevity = min(0.0, 1 - longer[1] / longer[0])          # being short is the only way to cheat precision
    return math.exp(brevity + np.log(hits / total).mean())


def common_subsequence(a, b):
    """Length of the longest common subsequence of two word lists, one bit per word of `a` (Hyyro 2004).

    A zero bit marks where the best match so far grew; the addition carries each growth to the next free word.
    """
    where = {}
    for k, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << k
    full = state = (1 << len(a)) - 1
    for word in b:
        hit = state & where.get(word, 0)
        state = ((state + hit) | (state - hit)) & full
    return len(a) - state.bit_count()


def rouge_l(made, truth):
    """Mean ROUGE-L F1 (Lin 2004): lower case, letters and digits only, no stemming. Two lists of str -> 0..1."""
    scores = []
    for a, b in zip(made, truth):
        a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (a, b))
        scores.append(2 * common_subsequence(a, b) / max(len(a) + len(b), 1))
    return float(np.mean(scores))


# ---- 3. Statements: is it true? ------------------------------------------------------------------------------------
def codes_of(poses, sources=None):
    """The codes of poses (n,22,3,3) that face +z, or of the ways there from sources (n,22,3,3)."""
    return posecodes(poses) if sources is None else paircodes(sources, poses)


def true_texts(poses, sources, seed):
    """True texts of the embedded world: captions of poses (n,22,3,3), or how to get there from sources (n,22,3,3)."""
    codes, say = codes_of(poses, sources), caption if sources is None else difference
    return [say(codes, k, np.random.default_rng((seed, k))) for k in range(len(poses))]


def shares(marks):
    """Marks [(within tolerance, exactly), …] -> both shares of True. Saying nothing scores 0."""
    return [sum(column) / len(marks) for column in zip(*marks)] if marks else [0.0, 0.0]


def pose_statement_metrics(texts, poses, sources=None):
    """Made poses (n,22,3,3), facing +z, against their captions, or against differences from sources (n,22,3,3).

    Returns the share of all statements that hold: statement_accuracy within the tolerance of the captioning pipeline
    (a category that its noise could have reached), statement_accuracy_exact without it.
    """
    codes = codes_of(poses, sources)
    within, exact = shares([mark for k, text in enumerate(texts) for mark in check_statements(text, codes, k)])
    return {"statement_accuracy": within, "statement_accuracy_exact": exact}


def text_statement_metrics(made, truth, poses, sources=None):
    """Made texts against the poses they speak of, and against what the references say.

    precision, precision_exact: share of the statements made that hold; a sentence outside the grammar never holds, and
    one said twice in a text counts once. recall: share of the references' statements that were made. f1: of both.
    """
    codes, marks, recalled = codes_of(poses, sources), [], []
    for k, (text, reference) in enumerate(zip(made, truth)):
        once = dict.fromkeys(line.strip() for line in text.lower().split("."))
        marks += check_statements(". ".join(once), codes, k)
        said = set(statements(text))
        recalled += [statement in said for statement in set(statements(reference))]
    (precision, exact), recall = shares(marks), sum(recalled) / max(len(recalled), 1)
    return {"precision": precision, "precision_exact": exact, "recall": recall,
            "f1": 2 * precision * recall / max(precision + recall, 1e-9)}


def view_metrics(made, views):
    """view_accuracy: share of texts that say from which side the picture shows the person, where that can be said;
    view_balanced: mean over the sides of the share of each. Paper §4.3: general models mistake the orientation."""
    right = {view: [view_in(text) == view for text, own in zip(made, views) if own == view] for view in set(views)}
    right.pop("", None)
    return {"view_accuracy": float(np.mean(sum(right.values(), []))),
            "view_balanced": float(np.mean([np.mean(marks) for marks in right.values()]))} if right else {}


# ---- 4. Embeddings: what a retrieval_model that has seen many poses and texts thinks -----------------------------------------
def rank_of_own(similarity):
    """(n,n) -> (n,) how many columns beat each row's own. A tie counts half: equal answers must not all win."""
    own = similarity.diagonal()[:, None]
    return (similarity > own).sum(1) + ((similarity == own).sum(1) - 1) / 2


def r_precision(query, answer, top=3, group=32):
    """Share of queries whose own answer is among the best k of its group, k = 1..top. (n,d) unit vectors -> list.

    Groups are consecutive rows, so shuffle first if the order means anything; the incomplete last one is dropped.
    """
    whole = len(query) // group * group
    similarity = query[:whole].view(-1, group, query.size(1)) @ answer[:whole].view(-1, group, answer.size(1)).mT
    rank = torch.cat([rank_of_own(block) for block in similarity]) if whole else torch.empty(0)
    return [(rank < k).float().mean().item() for k in range(1, top + 1)] if whole else []


def recall_at(query, answer, tops=(1, 5, 10, 20)):
    """Share of queries whose own answer is among the best k of the whole set. (n,d) unit vectors -> list."""
    rank = rank_of_own(query @ answer.mT)
    return [(rank < k).float().mean().item() for k in tops]


def frechet(a, b):
    """FID (Heusel 2017): distance of two clouds (n,d) as if both were Gaussian, float64.

    tr (A B)^1/2 is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, which is symmetric even where A and B are
    singular (fewer samples than dimensions): no matrix root of a product, no complex numbers.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)                                       # (d,d) each
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                             # (d,d)
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(0.0, distance.item())                        # rounding can leave -1e-16


# ---- 5. The retrieval model: a retrieval_model, not a part of UniPose --------------------------------------------------------
class Retrieval(nn.Module):
    """Poses and captions, or pose pairs and differences, in one space of unit vectors (UniPose appendix B.2).

    pose   the tokenizer's encoder -> 40 places of d channels; the pair version joins A and B place by place;
           a convolution that takes the places as channels leaves one vector
    text   word embeddings -> biGRU with a learned start -> one vector
    One module carries both retrieval models: encoder, text side and scale are shared (the official code trains two networks).
    words: size of the text vocabulary (official: frozen DistilBERT embeddings; here learned); d: 512 in the paper.
    """

    def __init__(self, words, d=128):
        super().__init__()
        self.config = {"words": words, "d": d}
        shape = TokenizerConfig(code_dim=d, hidden=d, upsample_step=1)
        self.pose_encoder = Encoder(shape)
        self.pair_encoder = nn.Sequential(nn.Conv1d(2 * d, 2 * d, 3, padding=1), nn.ReLU(), nn.Conv1d(2 * d, d, 3, padding=1),
                                  nn.ReLU(), nn.Conv1d(d, d, 3, padding=1))
        self.pool = nn.Conv1d(shape.n_tokens, 1, 3, padding=1)
        self.word_embedding = nn.Embedding(words, d)
        self.text_input = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d), nn.Linear(d, d))
        self.gru = nn.GRU(d, d, batch_first=True, bidirectional=True)
        self.gru_state = nn.Parameter(torch.randn(2, 1, d))
        self.text_output = nn.Sequential(nn.Linear(2 * d, d), nn.LayerNorm(d), nn.LeakyReLU(0.2), nn.Linear(d, d))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def embed_pose(self, pose):
        """pose (B,22,3,3) -> (B,d), length 1."""
        return F.normalize(self.pool(self.places(pose).mT).squeeze(1), dim=-1)           # (B,d)

    def embed_pair(self, pair):
        """pair (B,2,22,3,3), A then B -> (B,d), length 1."""
        both = torch.cat([self.places(pair[:, 0]), self.places(pair[:, 1])], 1)          # (B,2d,40)
        return F.normalize(self.pool(self.pair_encoder(both).mT).squeeze(1), dim=-1)             # (B,d)

    def places(self, pose):
        return self.pose_encoder(matrix_to_sixd(pose))                                        # (B,d,40)

    def embed_text(self, ids, mask):
        """ids (B,T) long, mask (B,T) True on words, padding on the right -> (B,d), length 1."""
        length = mask.sum(1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.text_input(self.word_embedding(ids)), length, True, enforce_sorted=False)
        _, last = self.gru(packed, self.gru_state.expand(-1, len(ids), -1).contiguous())     # (2,B,d) one per direction
        return F.normalize(self.text_output(torch.cat([last[0], last[1]], -1)), dim=-1)         # (B,d)

    def forward(self, pose, ids, mask):
        """pose (B,22,3,3) or pairs (B,2,22,3,3) with their texts -> loss, {"top1", "scale"}.

        Cross-entropy over the batch on scaled cosines, both directions: the own text must win among B, and back.
        """
        bodies = self.embed_pair(pose) if pose.dim() == 5 else self.embed_pose(pose)     # (B,d)
        similarity = self.scale * bodies @ self.embed_text(ids, mask).T                  # (B,B)
        own = torch.arange(len(pose), device=pose.device)
        loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        return loss, {"top1": (similarity.argmax(1) == own).float().mean(), "scale": self.scale.detach()}


def tokenize_texts(text, captions, limit=196):
    """Captions -> ids (B,T), mask (B,T) for `Retrieval.embed_text`. text: the Hugging Face tokenizer of the model."""
    rows = [text(caption, add_special_tokens=False).input_ids[:limit] for caption in captions]
    longest = max(1, *map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


def load_retrieval_model(folder, device="cpu"):
    """The retrieval model that travels in a weights folder, or None where none was trained. Raises UserError."""
    config = read_config(folder).get("retrieval")
    if not config:
        return None
    path = pathlib.Path(folder) / "model.safetensors"
    with torch.random.fork_rng():
        retrieval_model = Retrieval(**config)
    load_strictly(retrieval_model, {k.removeprefix(RETRIEVAL_PREFIX): v for k, v in read_tensors(path).items() if k.startswith(RETRIEVAL_PREFIX)}, path)
    return retrieval_model.to(device).eval()


# ---- 6. Exams: what is asked, and what is true ---------------------------------------------------------------------

class EvalSet:
    """n questions of one task over the first 2n people of a world, where every two make a pair.

    poses (n,22,3,3): the pose to be made or told of, as the answer should show it; sources (n,22,3,3): pose A of the
    pair tasks, else None; texts: n true texts, views: the sides that image2text can see; target: "pose" | "text".
    """

    def __init__(self, world, task, n, seed=0):
        self.world, self.task, self.seed, row = world, task, seed, TASKS[task]
        self.target = row.target
        self.starts = 2 * torch.arange(n)                  # person A, or the only one
        self.rows = self.starts + int(row.pair)            # whom the answer is about
        self.poses = world.poses[self.rows]
        self.sources = world.poses[self.starts] if row.pair else None
        self.views = [world.views[i] if row.text == "image_caption" else "" for i in self.rows]
        self.texts = [world.text(task, 2 * k, self.rng(k)) for k in range(n)]
        self.turns = torch.eye(3).expand(n, 3, 3)          # from the body's frame to the answer's
        if row.frame == "camera":
            self.poses = world.camera_poses[self.rows]
            self.turns = self.poses[:, 0] @ world.poses[self.rows, 0].mT

    def rng(self, k):
        """The generator of the k-th text."""
        return np.random.default_rng((self.seed, k))

    def question(self, k, model=None):
        """The k-th prompt: the task's plain template (of that model), filled in, without its answer."""
        *inputs, _ = self.world.example(self.task, 2 * k, self.rng(k))
        return question(self.task, inputs, model)

    def facing(self, poses):
        """Poses in the answer's frame, turned back to face +z, which is where statements are made."""
        return turn_root(poses, self.turns.mT)                                           # (n,22,3,3)


class Evaluator(NamedTuple):
    """Marks answers. body: whose joints are measured; retrieval_model: a Retrieval or None; text: the model's HF tokenizer."""
    body: object
    retrieval_model: object
    text: object

    def metrics(self, exam, made):
        """made: n poses (n,22,3,3) or n texts, as the exam asks -> {name of a figure: value}."""
        if exam.target == "text":
            marks = {"bleu4": bleu4(made, exam.texts), "rouge_l": rouge_l(made, exam.texts)}
            marks |= text_statement_metrics(made, exam.texts, exam.poses, exam.sources)
            marks |= view_metrics(made, exam.views)
            return marks | self.retrieval_metrics(exam, exam.poses, made)
        joints, truth = self.body.joints(made), self.body.joints(exam.poses)             # (n,22,3) each
        marks = {"mpjpe": mpjpe(joints, truth).mean().item(), "pa_mpjpe": pa_mpjpe(joints, truth).mean().item()}
        marks |= pose_statement_metrics(exam.texts, exam.facing(made), exam.sources)
        return marks | self.retrieval_metrics(exam, made, exam.texts)

    @torch.no_grad()
    def retrieval_metrics(self, exam, poses, texts):
        """What the retrieval_model thinks of made poses with true texts, or the reverse; nothing without a retrieval_model.

        r_precision: own answer among the best 1, 2, 3 of 32; recall_at: among the best 1, 5, 10, 20 of all n; matching:
        mean cosine; fid: between the clouds of made and true poses.
        """
        if self.retrieval_model is None:
            return {}

        def embed(poses):
            poses = exam.facing(poses)
            if exam.sources is None:
                return self.retrieval_model.embed_pose(poses)
            return self.retrieval_model.embed_pair(torch.stack([exam.sources, poses], 1))
        told, shown = self.retrieval_model.embed_text(*tokenize_texts(self.text, texts)), embed(poses)  # (n,d) each
        asked, made = (told, shown) if exam.target == "pose" else (shown, told)
        marks = {"r_precision": r_precision(asked, made), "recall_at": recall_at(asked, made),
                 "matching": (told * shown).sum(-1).mean().item()}
        return marks | ({"fid": frechet(shown, embed(exam.poses))} if exam.target == "pose" else {})


# ---- 7. What must be beaten, what cannot be ------------------------------------------------------------------------
def nearest_by_statements(asked, known):
    """For each asked caption the index of the known one that says most nearly the same: cosine of statement sets."""
    said = [dict.fromkeys(statements(text)) for text in [*known, *asked]]
    column = {statement: i for i, statement in enumerate(dict.fromkeys(s for one in said for s in one))}
    bags = torch.zeros(len(said), len(column))
    for row, one in zip(bags, said):
        row[[column[s] for s in one]] = 1
    bags = F.normalize(bags)                               # (known+asked,statements)
    return (bags[len(known):] @ bags[:len(known)].T).argmax(1)


@torch.no_grad()
def nearest_by_features(asked, known, vision):
    """For each picture of exam `asked` the index of the picture of exam `known` most alike to the frozen eyes."""
    def look(exam):
        rows = exam.rows.tolist()
        return torch.cat([vision([exam.world.image(i) for i in rows[k:k + 32]]).mean(1).cpu()   # (32,Dv) over patches
                          for k in tqdm(range(0, len(rows), 32), desc=f"{exam.task}: frozen features", leave=False)])
    theirs, ours = look(known), look(asked)
    middle, spread = theirs.mean(0), theirs.std(0) + 1e-6  # what all pictures share tells nobody apart
    theirs, ours = (F.normalize((features - middle) / spread, dim=1) for features in (theirs, ours))
    return (ours @ theirs.T).argmax(1)


def baselines(exam, known, model, seed):
    """name -> answers made without a language model, out of the training people of the exam `known`."""
    chosen, row = {}, TASKS[exam.task]                     # name -> which training person's answer is copied
    if exam.target == "text":
        chosen["random_caption"] = np.random.default_rng(seed).integers(len(known.texts), size=len(exam.texts))
    if row.inputs == ("text",):
        chosen["nearest_caption"] = nearest_by_statements(exam.texts, known.texts)
    if row.inputs == ("image",):
        chosen["nearest_feature"] = nearest_by_features(exam, known, model.vision)
    if exam.target == "text":
        return {who: [known.texts[k] for k in rows] for who, rows in chosen.items()}
    answers = {"mean_pose": project_rotation(known.poses.mean(0)).expand_as(exam.poses)}
    answers |= {who: known.poses[rows] for who, rows in chosen.items()}
    return answers | ({"input_pose": exam.sources} if row.pair else {})


@torch.no_grad()
def round_trip(model, poses):
    """Poses (n,22,3,3) -> codes (n,N) and what the tokenizer makes of them (n,22,3,3)."""
    codes = model.pose_tokenizer.encode(poses.to(model.device))
    return codes.cpu(), model.pose_tokenizer.decode(codes).cpu()


def upper_bounds(exam, model, seed):
    """name -> answers that no speaker of code words can beat: the truth, and the truth seen through the tokenizer.

    A true text is told a second time with other dice, which is the BLEU and the recall of a perfect speaker.
    """
    truth = {"tokenizer": round_trip(model, exam.poses)[1], "ground_truth": exam.poses}
    if exam.target == "pose":
        return truth
    return {who: [*map(add_view, exam.views, true_texts(p, exam.sources, seed + 1))] for who, p in truth.items()}


# ---- 8. The whole report -------------------------------------------------------------------------------------------
def answer_all(model, exam, decode, batch):
    """The model's answers to an exam: poses (n,22,3,3) or a list of n texts."""
    made, n = [], len(exam.texts)
    for k in tqdm(range(0, n, batch), desc=f"{exam.task}: {decode}", leave=False):
        questions = [exam.question(i, model) for i in range(k, min(k + batch, n))]
        made += generate(model, questions, [exam.target] * len(questions), decode=decode)
    return torch.stack([a.pose for a in made]) if exam.target == "pose" else [a.text for a in made]


def evaluate_task(model, judge, exam, known, decodes, batch, seed):
    """One task -> its figures by the first way of decoding that changes it; the others stand under "decoding"."""
    first, *others = [way for way in decodes if exam.target == "pose" or way != "soft"] or ["argmax"]
    report = judge.metrics(exam, answer_all(model, exam, first, batch)) | {"decode": first}
    if others:
        report["decoding"] = {way: judge.metrics(exam, answer_all(model, exam, way, batch)) for way in others}
    report["baselines"] = {who: judge.metrics(exam, made) for who, made in baselines(exam, known, model, seed).items()}
    report["ceilings"] = {who: judge.metrics(exam, made) for who, made in upper_bounds(exam, model, seed).items()}
    return report


def evaluate_tokenizer(model, judge, exam):
    """The tokenizer alone: its error, and which shares of the statements and of the code words are alive."""
    codes, made = round_trip(model, exam.poses)
    marks = judge.metrics(exam, made)
    use = torch.bincount(codes.flatten(), minlength=model.pose_tokenizer.config.codes).double() / codes.numel()
    return {"mpjpe": marks["mpjpe"], "pa_mpjpe": marks["pa_mpjpe"], "active": (use > 0).double().mean().item(),
            "perplexity": torch.special.entr(use).sum().exp().item(),
            "statements_kept": marks["statement_accuracy"], "statements_kept_exact": marks["statement_accuracy_exact"]}


def evaluate(model, judge, tasks=tuple(TASKS), split="test", n=512, decode="argmax", batch=32, pool=1024, seed=0):
    """Every figure of a model as a JSON-able dict: millimetres and fractions.

    n questions a task from the first 2n people of `split`; the baselines may look at `pool` people of the train split.
    decode: one way, or several with commas between; the first gives a task's own figures.
    """
    size = model.vision.clip_size
    world, train = World(split, 2 * n, size), World("train", 2 * pool, size)
    report = {"size": model.config["size"], "seed": seed, "split": split, "n": n, "body": judge.body.name,
              "decode": decode, "tokenizer": evaluate_tokenizer(model, judge, EvalSet(world, "text2pose", n, seed)),
              "tasks": {}}
    for task in tasks:
        exam, known = EvalSet(world, task, n, seed), EvalSet(train, task, pool, seed)
        report["tasks"][task] = evaluate_task(model, judge, exam, known, decode.split(","), batch, seed)
    return report


PROTOCOL = """{weights} ({size}): {split} split, {n} questions a task, body {body}, seed {seed}, plain templates
MPJPE in mm: 22 joints, pelvis at the origin, nothing rotated; PA: after the best similarity. True: share of statements
within the tolerance of the captions; exactly: without it; recall and F1: of statements. - to be beaten, + not to be
"""
COLUMNS = {"MPJPE": ("mpjpe",), "PA": ("pa_mpjpe",), "true": ("statement_accuracy", "precision", "statements_kept"),
           "exactly": ("statement_accuracy_exact", "precision_exact", "statements_kept_exact"), "recall": ("recall",),
           "F1": ("f1",), "view": ("view_accuracy",), "BLEU-4": ("bleu4",), "ROUGE-L": ("rouge_l",),
           "R@1/32": ("r_precision",), "FID": ("fid",)}


def format_table(report):
    """The report as aligned lines: one row for each task and whoever answered it."""
    rows = [("tokenizer", f"{report['tokenizer']['active']:.0%} codes active", report["tokenizer"])]
    for task, figures in report["tasks"].items():
        rows.append((task, f"UniPose {figures['decode']}", figures))
        for group, mark in (("decoding", "UniPose"), ("baselines", "-"), ("ceilings", "+")):
            rows += [("", f"{mark} {who}", marks) for who, marks in figures.get(group, {}).items()]

    def cell(column, marks):
        value = next((marks[key] for key in COLUMNS[column] if key in marks), None)
        value = next(iter(value), None) if isinstance(value, list) else value
        return f"{'' if value is None else format(value, '.1f' if column in ('MPJPE', 'PA') else '.3f'):>8}"
    return [f"{'':<34}" + "".join(f"{column:>8}" for column in COLUMNS),
            *(f"{task:<12}{who:<22}" + "".join(cell(c, marks) for c in COLUMNS) for task, who, marks in rows)]


# ---- 9. How fast ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def pose_seconds(model, reader, stepwise):
    """Seconds from a prompt that is read already to the N codes of a pose; the reader is left as it was.

    Parallel: <p>, N queries and </p> go through in one step. Stepwise: <p>, then each code before the next is said.
    """
    v, n, fork = model.vocab, model.pose_tokenizer.n_tokens, copy.copy(reader)
    fork.cache = copy.deepcopy(reader.cache)
    codes = model.llm.lm_head.weight[v.pose0:v.p_open]                                   # (K,D)

    def read(ids, block, code_index):
        ids, block, code_index = (torch.tensor([row], device=model.device) for row in (ids, block, code_index))
        hidden = fork.read_ids(ids, block, code_index, torch.ones_like(ids, dtype=torch.bool))  # (1,q,D)
        return (hidden[0] @ codes.T).argmax(-1).tolist()                                 # q codes

    begun, last = time.perf_counter(), v.p_open
    if stepwise:
        for code_index in range(-1, n - 1):                      # <p> stands before code_index 0
            last = v.pose0 + read([last], [-1], [code_index])[0]
    else:
        read([v.p_open, *range(v.query0, v.query0 + n), v.p_close], [-1, *[0] * n, -1], [-1] * (n + 2))
    return time.perf_counter() - begun


def medians(repeats, **runs):
    """name -> median milliseconds of a run that returns its seconds. The runs take turns, so noise hits all alike."""
    rounds = [[run() for run in runs.values()] for _ in range(repeats + 1)][1:]          # the first round warms up
    return dict(zip(runs, (1000 * np.median(rounds, axis=0)).tolist()))


def copy_speed(device, size=1 << 28):
    """Bytes a second that this machine copies, read and written counted, at its best. No step of an LLM is faster than
    reading its weights once."""
    source, seconds = torch.ones(size, dtype=torch.uint8, device=device), []
    target = torch.zeros_like(source)
    for _ in range(7):
        begun = time.perf_counter()
        target.copy_(source)[-1].item()                    # .item() waits for a GPU
        seconds.append(time.perf_counter() - begun)
    return 2 * size / min(seconds)


def measure_speed(model, seed=0, repeats=7):
    """Milliseconds: a pose in one step against one by one, from the same cached prompt, and every task's latency."""
    exams = {task: EvalSet(World("test", 2, model.vision.clip_size), task, 1, seed) for task in TASKS}
    row, reader = model.encode(exams["text2pose"].question(0, model)), CachedModel(model, 1)
    prompt = torch.tensor([row.ids], device=model.device)                                # (1,T)
    causal = torch.full_like(prompt, -1)
    with torch.no_grad():
        reader.read_ids(prompt, causal, causal, torch.ones_like(prompt, dtype=torch.bool))

    def whole(task, decode="argmax"):
        # an untrained model does not know when to stop: a pose answer gets no more steps than it needs
        steps = 160 if exams[task].target == "text" else model.pose_tokenizer.n_tokens + 3 if decode == "ar" else 3
        prompt, begun = exams[task].question(0, model), time.perf_counter()
        generate(model, [prompt], [exams[task].target], decode=decode, max_new=steps)
        return time.perf_counter() - begun

    import resource  # not on Windows

    read = [*model.llm.model.layers.parameters(), model.llm.lm_head.weight]
    weights = sum(p.numel() * p.element_size() for p in read)
    pose = medians(repeats, parallel=lambda: pose_seconds(model, reader, False),
                   one_by_one=lambda: pose_seconds(model, reader, True))
    full = medians(repeats, parallel=lambda: whole("text2pose"), one_by_one=lambda: whole("text2pose", "ar"))
    latency = medians(repeats, **{task: functools.partial(whole, task) for task in TASKS})
    copied, held = copy_speed(model.device), torch.cuda.max_memory_allocated() if model.device.type == "cuda" else (
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {"prompt_tokens": len(row.ids), "pose_tokens": model.pose_tokenizer.n_tokens, "latency_ms": latency,
            "llm_gb": weights / 1e9, "copy_gb_per_s": copied / 1e9, "read_once_ms": 1000 * weights / copied,
            "peak_memory_gb": held / 1e9,
            "pose_ms": pose, "pose_ratio": pose["one_by_one"] / pose["parallel"],
            "answer_ms": full, "answer_ratio": full["one_by_one"] / full["parallel"]}


def format_speed(figures):
    """The speed report as lines."""
    lines = ["{pose_tokens} code words a pose, {prompt_tokens} tokens before it, median ms".format(**figures),
             f"{'':<36}{'parallel':>10}{'one by one':>12}{'ratio':>8}"]
    for key, what in (("pose", "the pose, from the cached prompt"), ("answer", "the whole answer, prompt included")):
        times, ratio = figures[f"{key}_ms"], figures[f"{key}_ratio"]
        lines.append(f"{what:<36}{times['parallel']:>10.1f}{times['one_by_one']:>12.1f}{ratio:>7.1f}x")
    lines.append("the LLM is {llm_gb:.2f} GB: {read_once_ms:.1f} ms to read once at {copy_gb_per_s:.0f} GB/s, measured "
                 "by copying; peak memory {peak_memory_gb:.1f} GB".format(**figures))
    return [*lines, "latency of one answer: " + ", ".join(f"{t} {ms:.0f}" for t, ms in figures["latency_ms"].items())]


# ---- 10. The command line ------------------------------------------------------------------------------------------
@dataclass
class Config:
    """Measure a model on its embedded test split."""
    weights: str = TINY  # the folder of the model, or the official release's `cache`
    size: str = ""  # nano | tiny | paper: random weights of this size instead, for --speed
    split: str = "test"  # test | val | train
    n: int = 512  # questions a task
    tasks: list[str] = field(default_factory=list)  # only these tasks
    decode: str = "argmax"  # argmax | soft | vote | ar, several with commas between
    batch: int = 32  # questions answered side by side
    pool: int = 1024  # training people that the baselines may look at
    seed: int = 0  # of the captions
    device: str = ""  # cpu | cuda; empty: the GPU where there is one
    body: str = ""  # an SMPL file whose joints are measured; empty: the free body
    json: str = ""  # write all figures here
    speed: bool = False  # measure time instead of quality
    features: str = ""  # write retrieval features of --poses here (.npy), for data.py --build imagediff
    poses: list[str] = field(default_factory=list)  # --features: data sets, KIND:PATH as for data.py


def random_model(size, seed, device):
    """Random weights of a size, made where they are used; on a GPU all but the pose tokenizer in bfloat16."""
    torch.manual_seed(seed)
    text = word_tokenizer(vocabulary())
    if size == "paper":                                    # a head as large as the paper's, though few words are known
        text = word_tokenizer([*vocabulary(), *(f"word{i}" for i in range(PAPER_TEXT - len(text)))])
    with torch.device(device):
        model = UniPose(model_config(size), text).eval()
    for name, parameter in model.named_parameters():
        if device.startswith("cuda") and not name.startswith("pose_tokenizer."):
            parameter.data = parameter.data.bfloat16()
    return model


def validate(config):
    """Settings that cannot work. Raises UserError."""
    for flag, given, choices in (("tasks", config.tasks, TASKS), ("size", [config.size], ["", *SIZES]),
                                 ("split", [config.split], ["test", "val", "train"]),
                                 ("decode", config.decode.split(","), DECODINGS)):
        for one in given:
            if one not in choices:
                raise UserError(f"--{flag} {one} is not one of {', '.join(filter(None, choices))}")
    if min(config.n, config.batch, config.pool) < 2:
        raise UserError("--n, --batch and --pool must be at least 2")


def main(argv=None):
    """Prints one table, or times."""
    config = cli(Config, argv)
    validate(config)
    device, retrieval_model = find_device(config.device), None
    if config.size:
        model = random_model(config.size, config.seed, device)
    else:
        model, retrieval_model = load(config.weights, device), load_retrieval_model(config.weights)
    validate_decoding(model, *config.decode.split(","))
    if config.features:
        if retrieval_model is None:
            raise UserError(f"{config.weights} has no retrieval model: train it with train.py --stage retrieval")
        parts = face_front(records_with_pose(config.poses)[1]).split(256)
        with torch.no_grad(), atomic_write(config.features) as path, open(path, "wb") as file:
            np.save(file, torch.cat([retrieval_model.to(device).embed_pose(part.to(device)).cpu() for part in parts]).numpy())
        return
    if config.speed:
        report = {"size": model.config["size"], "seed": config.seed, "speed": measure_speed(model, config.seed)}
        lines = format_speed(report["speed"])
        lines += ["(the paper, on an A100: 200 ms in parallel, 2500 one by one)"] * (config.size == "paper")
    else:
        judge = Evaluator(load_body(config.body), retrieval_model, model.text_tokenizer)
        report = evaluate(model, judge, config.tasks or tuple(TASKS), config.split, config.n, config.decode,
                          config.batch, config.pool, config.seed)
        name = f"random weights, seed {config.seed}" if config.size else config.weights
        lines = [PROTOCOL.format(weights=name, **report), *format_table(report)]
    print("\n".join(lines))
    if config.json:
        with atomic_write(config.json) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
