"""Ask UniPose: texts, pictures or poses in, a text or a pose out.

A text is decoded token by token. A pose takes ONE step: <p>, N queries and </p> go through the
model together, and query i names code i (paper, section 3.3). Where a pose is wanted they follow
the prompt at once; a model that decides for itself reads them as soon as it says <p>:

    a pose    step 1   prompt .....  <p> q q q q ... q </p>   -> N codes at once, then "</s>"

    a text    step 1   prompt .....                           -> "the"
              step 2   the                                    -> "left"
              step 3   left                                   -> "knee"   ...

The rows of a batch may differ in task, in length and in what they answer. Prompts are padded on the
left, and a row that reads fewer tokens in a step than others gets masked columns: batching never
changes an answer.

Letters: B rows, T tokens of the longest prompt, q columns read in one step, N pose tokens, K codes,
D LLM width.

    python sample.py                          # the tour: an example of each task, one picture
    python sample.py --text "The left knee is bent. Both hands are above the head."
    python sample.py --image photo.jpg --task image2pose --save person.glb --show person.html
    python sample.py --image crowd.jpg --task image2pose --box 40,10,120,300
    python sample.py --pose a.npz --ask "Let the person in <pose> kneel." --task edit
    python sample.py --pose walk.npz --every 30     # a caption of every 30th frame
    python sample.py --jsonl questions.jsonl --out answers.jsonl
    python sample.py --chat                         # a conversation; Ctrl-D ends it
    python sample.py --chat < turns.txt             # the same, a turn a line

    >>> from unipose import load
    >>> model = load("weights/tiny")
    >>> answer = model.answer("The left hand is above the head.")
    >>> answer.pose.shape                     # rotations; answer.codes: its N code words
    torch.Size([22, 3, 3])

Several questions at once, in a batch:

    >>> from sample import generate, question
    >>> prompts = [question("text2pose", ["Kneeling."]), question("pose2text", [answer.pose])]
    >>> kneeling, caption = generate(model, prompts, wants=["pose", "text"])

A conversation goes on from turn to turn: "now raise the left arm", "describe it". <image photo.jpg>
and <pose walk.npz:120> stand for files. The model decides whether it answers with a pose or a text.
Earlier turns stand in front of the prompt, in which their poses face front; when the context is
full, the oldest ones are forgotten.

    from sample import Conversation
    conversation = Conversation(model)    # a model that has been through the stage `reason`
    conversation.ask("Create the pose that fits this text. Kneeling.").pose
    conversation.ask("Describe it.").text

A question about one of several people (`reason`, `reason_text`) may fit nobody: then the answer is
the text data.NOBODY, and no pose. That is also what to expect of a picture without people, but no
training picture is one.

A line of a file of questions holds what the flags would say: {"text": "Kneeling."}, or {"task":
"image2text", "image": "photo.jpg"}; paths begin at the folder of the file, "id" may be anything. Of
each there is a row of answers: its "line" and "question", then "text", or "pose": axis-angles
(22,3) in radians, y up, +z front, or "error". A run that was cut goes on behind the last whole row.

Left out: streaming, top-k and beam search, and captions of a motion as a whole: --every describes
single frames.
"""
import base64
import contextlib
import difflib
import enum
import hashlib
import io
import json
import math
import os
import pathlib
import re
import struct
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from captions import check_text
from data import (
    HEAD, POOL, REASONING, SEVEN, SIDE_TINTS, SLOT, SMALLEST, TASKS, UP_TURNS, World, answerable,
    as_rotations, body_colors, contact_sheet, default_body, draw_pose, drop_introduction,
    open_picture, project, read_frames, read_pose, render_template, save_png, share_shown,
    split_pose_path, square, templates, to_rgb, unseen_phrases, upright_reading, uprightness,
    vertex_normals, write_pose,
)
from tokenizer import (
    ASSETS, JOINTS, LEFT_WRIST, PARENTS, RIGHT_WRIST, TINY, UserError, as_user_error, atomic_write,
    check_entries, cli, explain_write_error, face_front, global_transforms, load_asset, load_body,
    matrix_to_aa, matrix_to_quaternion, progress_bar, require_file, run_main, shorten,
    validate_folder, validate_writable,
)
from unipose import (
    POSE_CHARACTERS, Row, collate, find_device, float_mask, load, mixed_mask, normalise_text,
    read_config, read_pose_words, require_codes, require_stages, set_threads,
)


# ---- 1. What a row answers -----------------------------------------------------------------------
@dataclass
class Answer:
    """The finished answer of one row."""

    text: str                       # "" if it holds none
    pose: torch.Tensor | None       # (22,3,3) rotation matrices
    codes: list                     # the code words of the pose, if the model has any
    ids: list                       # every token of the answer, in order
    finished: bool                  # it ended with </s>, not at the length limit

    @property
    def value(self):
        """The pose, or the text of an answer without a pose."""
        return self.text if self.pose is None else self.pose

    def joints(self, body=None):
        """The joints (22,3) of the pose in metres, pelvis at 0; body: None for the free one.

        Raises UserError if the answer has no pose.
        """
        self.require_pose()
        body = body or default_body()
        return body.joints(self.pose)

    def save(self, path, body=None, mesh=False):
        """Writes the pose to a file, as its suffix says; see `save_poses`. Raises UserError."""
        self.require_pose()
        save_poses(path, self.pose, body or default_body(), mesh)

    def require_pose(self):
        """Raises UserError if the answer has no pose."""
        if self.pose is None:
            raise UserError("the answer has no pose, only a text; ask for a pose, for example with "
                            "task='text2pose' or task='image2pose'")


class State(enum.IntEnum):
    """What comes next in a row; the number is a row of `Engine.allowed_tokens`."""

    OPEN = 0        # text, or the <p> of a pose
    IN_POSE = 1     # the codes of a pose
    POSE_FULL = 2   # its </p>
    TEXT_ONLY = 3   # text: the row holds its pose already, or no pose is wanted
    DONE = 4        # nothing: the row said </s> or reached the length limit


@dataclass
class RowState:
    """One row of a batch while it is answered."""

    state: State
    ids: list = field(default_factory=list)
    codes: list = field(default_factory=list)
    probs: torch.Tensor | None = None   # (N,K) under the queries, for soft decoding
    words: list = field(default_factory=list)   # the pose as text, if the model writes it so
    prompt: list = field(default_factory=list)  # the segments that it answers
    pose: torch.Tensor | None = None    # (22,3,3)


def demand_of(model, prompt):
    """What a prompt demands of a pose: its texts, a line each, and the pose (22,3,3) they change.

    That is the pose of the prompt, or the last one of the turns before it; None if there is none.
    """
    lines = []
    source = None
    for kind, value, is_target in prompt:
        if kind == "turn":
            _, earlier = demand_of(model, [(*segment[:2], False) for segment in value])
            source = source if earlier is None else earlier
        elif kind == "text" and not is_target:
            lines.append(value)
        elif kind == "pose" and not is_target:
            source = torch.as_tensor(value)
            if not source.is_floating_point():
                [source] = model.pose_tokenizer.decode(source[None].to(model.device)).cpu()
    return "\n".join(lines), source


# ---- 2. Decoding ---------------------------------------------------------------------------------
class KVCache:
    """Keys and values of all layers, as the attention of transformers asks for them.

    Their buffers grow by half when they are full; torch.cat would copy all of them at every step.
    """

    def __init__(self, n_layers):
        self.keys = [None] * n_layers
        self.values = [None] * n_layers
        self.length = 0         # filled columns of the buffers

    def get_seq_length(self):
        return self.length

    def update(self, keys, values, layer, *args, **kwargs):
        """New keys and values (P,heads,q,d) of a layer -> all of them so far (P,heads,past+q,d)."""
        self.keys[layer] = self.append(self.keys[layer], keys)
        self.values[layer] = self.append(self.values[layer], values)

        end = self.length + keys.size(2)
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def append(self, buffer, new):
        """Writes new columns behind the filled ones -> the buffer, or a larger one."""
        if buffer is None:
            return new

        n_rows, n_heads, n_new, width = new.shape
        end = self.length + n_new
        if end > buffer.size(2):
            larger = new.new_empty(n_rows, n_heads, end + end // 2, width)
            larger[:, :, :self.length] = buffer[:, :, :self.length]
            buffer = larger
        buffer[:, :, self.length:end] = new
        return buffer


class CachedModel:
    """The model with the KV cache of P prompts, each of which has n answers: B = P n.

    The answers to one prompt are branches of one row of the cache. So the prompt is read and kept
    once, and the mask hides the branches from each other.

    valid (P,past): which columns of the cache hold a token.
    branch (past,): the branch that a column belongs to, -1 where all of them see it.
    branches (n,): those that are read now.
    n_read (B,1): how many tokens a branch has read, the prompt among them.
    """

    def __init__(self, model, n_prompts):
        device = model.device
        self.model = model
        self.cache = KVCache(len(model.llm.model.layers))
        self.valid = torch.zeros(n_prompts, 0, dtype=torch.bool, device=device)
        self.branch = torch.zeros(0, dtype=torch.long, device=device)
        self.branches = torch.tensor([-1], device=device)
        self.n_read = torch.zeros(n_prompts, 1, dtype=torch.long, device=device)

    def fork(self, n):
        """Lets every prompt go on in n branches."""
        self.branches = torch.arange(n, device=self.model.device)
        self.n_read = self.n_read.repeat_interleave(n, 0)

    def read(self, batch):
        """Reads the next q columns of every branch, a batch of `collate` -> hidden states (B,q,D).

        A column that is not valid in a branch stays in the cache, but the branch never looks at it
        and its positions do not count it.
        """
        device = self.model.device
        ids = batch["ids"].to(device)                                           # (B,q)
        code_index = batch["code_index"].to(device)                             # (B,q)
        valid = batch["valid"].to(device)                                       # (B,q)
        x = self.model.embed(ids, code_index, batch["images"])                  # (B,q,D)
        positions = (self.n_read + valid.cumsum(1) - 1).clamp(min=0)            # (B,q)
        self.n_read = positions[:, -1:] + 1

        # the branches of a prompt stand side by side in one row
        n_prompts, past = self.valid.shape
        n_rows, q, width = x.shape
        x = x.view(n_prompts, -1, width)                                        # (P,nq,D)
        positions = positions.view(n_prompts, -1)                               # (P,nq)
        block = batch["block"].to(device).view(n_prompts, -1)                   # (P,nq)
        valid = valid.view(n_prompts, -1)                                       # (P,nq)
        branch = self.branches.repeat_interleave(q)                             # (nq,)
        self.valid = torch.cat([self.valid, valid], 1)                          # (P,past+nq)
        self.branch = torch.cat([self.branch, branch])                          # (past+nq,)

        visible = (self.branch == branch[:, None]) | (self.branch < 0)          # (nq,past+nq)
        if q == 1:
            mask = float_mask(self.valid[:, None, None] & visible)              # (P,1,nq,past+nq)
        else:
            old = self.valid[:, None, None, :past] & visible[:, :past]          # (P,1,nq,past)
            new = mixed_mask(block, valid)                                      # (P,1,nq,nq)
            new.masked_fill_(~visible[:, past:], torch.finfo(new.dtype).min)
            mask = torch.cat([float_mask(old), new], -1)                        # (P,1,nq,past+nq)

        states = self.model.hidden(x, mask, positions, self.cache)              # (P,nq,D)
        self.cache.length += len(branch)
        return states.view(n_rows, q, -1)                                       # (B,q,D)

    def unread(self, row, n):
        """Hides the last n columns from a row, right after they have been read."""
        self.valid[row // len(self.branches), -n:] = False
        self.n_read[row] -= n


GREEDY_BELOW = 1e-4     # a draw at a lower temperature is the largest, or overflows


def validate_temperature(temperature):
    """Raises UserError if a temperature cannot be sampled at."""
    if not 0 <= temperature <= 100:         # false for NaN, too
        raise UserError(f"--temperature {temperature} must be from 0 to 100")


def sample_token(logits, temperature=0.0, generator=None):
    """Logits (n,) or (B,n) -> index () or (B,): the largest at temperature 0, else a draw."""
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)

    probs = (logits.float() / temperature).softmax(-1)
    cdf = probs.cumsum(-1)
    u = torch.rand(cdf[..., :1].shape, generator=generator, device=cdf.device)
    return torch.searchsorted(cdf, u * cdf[..., -1:], right=True).squeeze(-1)


DECODINGS = ("argmax", "soft", "check", "ar")
AVERAGED = ("soft", "check")        # these decode mean code vectors
CANDIDATES = 64                     # poses among which "check" chooses


def validate_decoding(model, *decodings):
    """Raises UserError if a decoding needs codes or queries and the model has none."""
    for decode in decodings:
        if decode != "argmax" and not model.has_codes:
            head = model.config["pose_head"]
            raise UserError(f"--decode {decode} is about codes, and this model has none: it was "
                            f"trained with --pose_head {head}; use --decode argmax")
        if decode in AVERAGED and model.config["attn"] == "causal":
            raise UserError(f"--decode {decode} needs the queries of a model trained with --attn "
                            "mixed, and this one is causal; use --decode argmax")


class Engine:
    """Answers batches of prompts: one KV cache, one RowState a row.

    decode: "argmax" takes the best code of each query (the paper), "soft" averages the codebook
    under each query's distribution, "check" does so in many ways and takes the pose that satisfies
    most of the prompt (see `choose`), "ar" decodes one code a step. A model trained with --attn
    causal has no queries and always decodes one code a step. Any other model was never trained on
    its own codes, so with it "ar" serves to measure time only. Models without codes have one way:
    with --pose_head mlp the hidden state of one query gives the rotations, at any temperature; with
    text a pose is written one character a step.
    temperature: 0 is greedy. max_tokens: a row stops after so many tokens at the latest.
    """

    def __init__(self, model, decode, temperature, generator, max_tokens):
        assert decode in DECODINGS, decode
        validate_temperature(temperature)
        self.model = model.eval()
        self.decode = decode
        self.temperature = temperature
        self.generator = generator
        self.max_tokens = max_tokens

        self.vocab = model.vocab
        self.eos = model.text_tokenizer.eos_token_id
        self.n_tokens = self.vocab.n_tokens
        self.writes_poses = model.config["pose_head"] == "text"
        self.code_by_code = (
            decode == "ar" or model.config["attn"] == "causal" or self.writes_poses)
        assert not (self.code_by_code and decode in AVERAGED), f"{decode} needs queries"
        self.allowed = self.allowed_tokens()

        # what nearly every answer says behind its pose, see `accept_suffix`
        is_greedy = temperature < GREEDY_BELOW
        self.suffix = model.answer_suffix if is_greedy and not self.code_by_code else []

    def generate(self, prompts, wants, n):
        """Prompts, and what each wants -> list of Answer; see the function `generate`."""
        # a tenth faster than no_grad; training cannot use its tensors, so `finish` stands outside
        with torch.inference_mode():
            rows = self.answer(prompts, wants, n)
        return self.finish(rows)

    def answer(self, prompts, wants, n):
        """Prompts, and what each wants -> list of RowState, n for each prompt."""
        # 1) prefill: all prompts in one step, each with the pose that it wants; padded on the left,
        #    their last tokens share a column
        if self.model.config["prompt_style"] != "released":     # that sees the square in the middle
            prompts = [square_pictures(prompt) for prompt in prompts]
        sequences = self.model.encode_all(prompts)
        for sequence, want in zip(sequences, wants):
            if want == "pose":
                self.open_answer(sequence)
        cached = CachedModel(self.model, len(prompts))
        states = cached.read(collate(sequences, side="left"))                   # (P,T,D)

        # 2) from here on a prompt has n answers, each a row
        rows = []
        for prompt, want in zip(prompts, wants):
            rows += [self.new_row(want, prompt) for _ in range(n)]
        if n > 1:
            cached.fork(n)
            states = states.repeat_interleave(n, 0)                             # (B,T,D)

        # 3) query i names code i
        end = states.size(1) - len(self.suffix)
        self.decode_queries(rows, states[:, :end])
        hidden = self.accept_suffix(rows, states, cached)                       # (B,D)

        while True:
            # 4) every unfinished row samples its next token
            tokens = self.sample_next(rows, hidden)                             # (B,)
            if all(row.state is State.DONE for row in rows):
                return rows

            # 5) rows that said <p> read it with N queries and </p>, the others read one token
            states = cached.read(self.next_batch(rows, tokens))                 # (B,q,D)
            self.decode_queries(rows, states)
            hidden = states[:, -1]                                              # (B,D)

    def allowed_tokens(self):
        """Which tokens may come next in a row -> bool (states,vocabulary)."""
        vocab = self.vocab
        allowed = torch.zeros(len(State), vocab.size, dtype=torch.bool)
        for state in (State.OPEN, State.TEXT_ONLY, State.DONE):
            allowed[state, :vocab.n_text] = True        # of a row that is done, it is not heard
        allowed[State.OPEN, vocab.p_open] = True
        allowed[State.IN_POSE, vocab.pose0:vocab.p_open] = True
        allowed[State.POSE_FULL, vocab.p_close] = True
        if self.writes_poses:
            characters = self.model.text_tokenizer.convert_tokens_to_ids(list(POSE_CHARACTERS))
            allowed[State.IN_POSE, characters] = True
            allowed[State.IN_POSE, vocab.p_close] = True
        return allowed.to(self.model.device)

    def new_row(self, want, prompt=()):
        """A row before its first token. want: "pose", "text", or None for either."""
        if want == "pose":
            ids = [*self.model.answer_prefix, self.vocab.p_open]
            return RowState(State.IN_POSE, ids, prompt=prompt)
        state = State.TEXT_ONLY if want == "text" else State.OPEN
        return RowState(state, prompt=prompt)

    def open_answer(self, sequence):
        """Adds a pose to a prompt that wants one, with all that stands around it in an answer."""
        for token in self.model.answer_prefix:
            sequence.add(token)
        self.open_pose(sequence)
        for token in self.suffix:
            sequence.add(token)

    def open_pose(self, sequence):
        """Adds <p> to a sequence and, if the model has queries, N of them and </p>."""
        vocab = self.vocab
        sequence.add(vocab.p_open)
        if self.code_by_code:
            return

        block = sequence.new_block()            # the queries see each other in both directions
        for query in range(vocab.query0, vocab.query0 + self.n_tokens):
            sequence.add(query, block=block)
        sequence.add(vocab.p_close)

    def next_batch(self, rows, tokens):
        """What the rows read next, as `collate` gives it. tokens (B,): what they have just said."""
        if any(row.state is State.IN_POSE for row in rows) and not self.code_by_code:
            return collate([self.next_sequence(row) for row in rows], side="left")

        vocab = self.vocab
        n_codes = torch.tensor([len(row.codes) for row in rows], device=tokens.device)
        is_code = (tokens >= vocab.pose0) & (tokens < vocab.p_open)             # (B,)
        code_index = torch.where(is_code, n_codes - 1, -1)
        return {
            "ids": tokens[:, None],                                             # (B,1)
            "block": torch.full_like(tokens, -1)[:, None],
            "code_index": code_index[:, None],
            "valid": torch.ones_like(is_code)[:, None],
            "images": None,
        }

    def next_sequence(self, row):
        """What a row reads next: its last token, and behind a <p> the queries of the pose."""
        sequence = Row()
        if row.state is State.IN_POSE:
            self.open_pose(sequence)
        else:
            sequence.add(row.ids[-1])
        return sequence

    def sample_next(self, rows, hidden):
        """Samples the next token of every row among those allowed: hidden (B,D) -> tokens (B,)."""
        logits = self.model.llm.lm_head(hidden)                                 # (B,vocabulary)
        allowed = self.allowed[[row.state for row in rows]]                     # (B,vocabulary)
        logits = logits.masked_fill(~allowed, -torch.inf)
        tokens = sample_token(logits, self.temperature, self.generator)         # (B,)

        for row, token in zip(rows, tokens.tolist()):
            if row.state is not State.DONE:
                self.append_token(row, token)
        return tokens

    def append_token(self, row, token):
        """Adds a token to a row and moves its state on."""
        vocab = self.vocab
        row.ids.append(token)

        if token == vocab.p_open:
            row.state = State.IN_POSE
        elif token == vocab.p_close:
            row.state = State.TEXT_ONLY
        elif vocab.pose0 <= token < vocab.p_open:
            row.codes.append(token - vocab.pose0)
            if len(row.codes) == self.n_tokens:
                row.state = State.POSE_FULL
        elif row.state is State.IN_POSE:
            row.words.append(token)

        if token == self.eos or len(row.ids) >= self.max_tokens:
            row.state = State.DONE

    def decode_queries(self, rows, states):
        """Samples all codes of every pose whose queries and </p> were read last. states (B,q,D).

        With --pose_head mlp the only query of each gives its rotations.
        """
        opened = [i for i, row in enumerate(rows) if row.state is State.IN_POSE]
        if self.code_by_code or not opened:
            return

        vocab = self.vocab
        queries = states[opened, -1 - self.n_tokens:-1]                         # (R,N,D)
        if self.model.pose_mlp:
            for i, pose in zip(opened, self.model.read_poses(queries[:, 0])):
                rows[i].pose = pose                                             # (22,3,3)
                self.append_token(rows[i], vocab.p_close)
            return

        code_head = self.model.llm.lm_head.weight[vocab.pose0:vocab.p_open]     # (K,D)
        logits = queries @ code_head.T                                          # (R,N,K)
        codes = sample_token(logits, self.temperature, self.generator)          # (R,N)

        for k, row_codes in enumerate(codes.tolist()):
            row = rows[opened[k]]
            if self.decode == "soft":
                row.probs = logits[k].softmax(-1)                               # (N,K)
            elif self.decode == "check":
                row.probs = self.choose(row.prompt, logits[k])                  # (N,K)
                row_codes = row.probs.argmax(-1).tolist()
            for code in row_codes:
                self.append_token(row, vocab.pose0 + code)
            self.append_token(row, vocab.p_close)

    def choose(self, prompt, logits):
        """Of CANDIDATES distributions the one whose pose satisfies most of what a prompt says.

        logits (N,K) -> probs (N,K). The first candidate is that of soft decoding; the others differ
        from it by Gumbel noise, which makes of it a draw that is a distribution still (Jang et al.
        2017). Of equally good ones the first is taken: a prompt of which nothing can be checked is
        decoded softly.
        """
        # the same noise in every row: an answer must not depend on the batch
        generator = torch.Generator(logits.device).manual_seed(0)
        shape = (CANDIDATES, *logits.shape)
        u = torch.rand(shape, generator=generator, device=logits.device)
        noise = -(-u.clamp(min=1e-20).log()).log()                              # (D,N,K)
        noise[0] = 0
        probs = (logits + noise).softmax(-1)                                    # (D,N,K)
        poses = self.model.pose_tokenizer.decode_soft(probs).cpu()              # (D,22,3,3)
        if any(kind == "image" for kind, _, _ in prompt):
            poses = face_front(poses)       # what is said is about people who face front
        text, source = demand_of(self.model, prompt)
        shares = share_shown(text, poses, source)                               # (D,)
        return probs[shares.argmax()]

    def accept_suffix(self, rows, states, cached):
        """Rows say the suffix that they have read behind their pose, if it is what they would say.

        This saves a step for each of its tokens; where the guess was wrong, it counts as not read.
        states (B,T,D) -> hidden (B,D), with which the rows go on.
        """
        hidden = states[:, -1].clone()                                          # (B,D)
        n = len(self.suffix)
        said = self.model.llm.lm_head(states[:, -1 - n:-1])                     # (B,n,vocabulary)
        said = said[..., :self.vocab.n_text].argmax(-1).tolist()

        for i, row in enumerate(rows):
            if row.state is not State.TEXT_ONLY or self.vocab.p_close not in row.ids:
                continue
            if said[i] == self.suffix:
                room = self.max_tokens - len(row.ids)
                for token in self.suffix[:room]:
                    self.append_token(row, token)
            else:
                cached.unread(i, n)
                hidden[i] = states[i, -1 - n]
        return hidden

    def finish(self, rows):
        """Rows -> their Answers: codes become rotations, ids become text.

        A pose that a model wrote as text, but not as `pose_words` does, is none.
        """
        if self.model.has_codes:
            self.decode_poses([row for row in rows if len(row.codes) == self.n_tokens])
        answers = []
        for row in rows:
            ids = row.ids
            if row.words:
                words = self.model.text_tokenizer.convert_ids_to_tokens(row.words)
                if self.vocab.p_close in ids:
                    row.pose = read_pose_words("".join(words))
                start = ids.index(self.vocab.p_open)
                ids = ids[:start] + ids[start + 1 + len(words):]
            text_ids = [i for i in ids if i < self.vocab.n_text and i != self.eos]
            answers.append(Answer(
                text=self.model.decode_text(text_ids),
                pose=None if row.pose is None else row.pose.cpu().clone(),
                codes=row.codes,
                ids=row.ids,
                finished=row.ids[-1] == self.eos,
            ))
        return answers

    @torch.no_grad()
    def decode_poses(self, rows):
        """Gives rows with all their codes the poses (22,3,3) that these stand for."""
        if not rows:
            return
        if self.decode in AVERAGED:
            probs = torch.stack([row.probs for row in rows])                    # (R,N,K)
            poses = self.model.pose_tokenizer.decode_soft(probs)                # (R,22,3,3)
        else:
            codes = torch.tensor([row.codes for row in rows], device=self.model.device)  # (R,N)
            poses = self.model.pose_tokenizer.decode(codes)                     # (R,22,3,3)
        for row, pose in zip(rows, poses):
            row.pose = pose


def square_pictures(segments):
    """Segments, their pictures padded to squares: the model sees squares only (`preprocess`)."""
    squared = []
    for kind, value, is_target in segments:
        if kind == "turn":
            value = square_pictures(value)
        if isinstance(value, np.ndarray):
            value = Image.fromarray(value)
        if isinstance(value, Image.Image):
            value = square(value)
        squared.append((kind, value, is_target))
    return squared


def kinds_in(segments):
    """The kinds of segments, "turn" and those within turns among them."""
    kinds = set()
    for kind, value, _ in segments:
        kinds.add(kind)
        if kind == "turn":
            kinds |= kinds_in(value)
    return kinds


def longest_answer(model):
    """How many tokens an answer has at most."""
    n_words = 160 if model.is_word_level else 512
    return max(n_words, model.pose_length + 4)      # <p>, </p>, perhaps a space, and </s>


def generate(model, prompts, wants=None, decode="argmax", temperature=0.0, generator=None,
             max_new=0, n=1):
    """Answers a batch of prompts -> list of Answer.

    prompts: segments without a target, see `question`; earlier turns of a conversation may stand in
    front, see `UniPose.join_turns`. wants: for each prompt "pose", "text", or None if the model may
    decide. decode, temperature: see `Engine`. max_new: a row stops after so many tokens at the
    latest; 0: 160, or 512 for a model of word pieces, as released. n: how many answers each prompt
    gets; they stand one behind the other in the list.

    A greedy answer is the same as if its prompt came alone. Answers at a temperature depend on the
    state of the generator, on all prompts of the batch and on n. Raises UserError if the model has
    not been trained for such prompts.
    """
    kinds = set()
    for prompt in prompts:
        kinds |= kinds_in(prompt)
    require_stages(
        model.stages, "image" in kinds, model.config["pose_head"], with_thought="turn" in kinds)

    max_new = max_new or longest_answer(model)
    engine = Engine(model, decode, temperature, generator, max_new)
    return engine.generate(prompts, wants or [None] * len(prompts), n)


# ---- 3. Questions --------------------------------------------------------------------------------
def question(task, inputs, model=None):
    """The inputs of a task, in order -> its prompt, always in the same wording.

    model: decides between our wording and that of the official release; None: ours.
    """
    template = templates(task)[0]
    if model is not None and model.config["prompt_style"] == "released":
        # the official model learned each task from one phrase before it saw others
        template = load_asset("instructions")["released"].get(task, template)

    segments = render_template(task, [*inputs, None], template)
    return segments[:-1]            # without the target


ASK_SLOTS = {"<image>": "image", "<pose>": "pose", "<caption>": "text"}


def own_question(words, inputs):
    """One's own words, with slots for the inputs, and these in order -> the prompt."""
    inputs = list(inputs)
    segments = []
    for piece in SLOT.split(words):
        if piece in ASK_SLOTS:
            segments.append((ASK_SLOTS[piece], inputs.pop(0), False))
        elif piece:
            segments.append(("text", piece, False))
    return segments


class Question(NamedTuple):
    """What is asked, about what."""

    name: str           # its task, or "ask" for one's own words
    inputs: list        # texts, pictures and poses (22,3,3), in the order of the prompt
    want: str | None    # "pose" or "text"; None: the model decides
    words: str = ""     # one's own, see `own_question`; "": those of the task
    label: str = ""     # which of several it is
    earlier: tuple = ()  # turns of a conversation before it: (Question, pose or text that answered)

    @property
    def shown(self):
        """What a picture shows of it: its inputs, behind one's own words."""
        if self.words:
            return [self.words, *self.inputs]
        return self.inputs or [templates(self.name)[0]]         # "Describe it."

    @property
    def has_image(self):
        return any(kind_of(value) == "image" for value in self.inputs)

    @property
    def typed(self):
        """All that a user has typed, in one text."""
        texts = [value for value in self.inputs if kind_of(value) == "text"]
        return " ".join([SLOT.sub(" ", self.words), *texts])

    def prompt(self, model):
        """Its prompt to a model, segments."""
        turns = []
        for asked, value in self.earlier:
            answer = (kind_of(value), value, True)
            turns.append(("turn", [*asked.prompt(model), answer], False))
        if self.words:
            return [*turns, *own_question(self.words, self.inputs)]
        return [*turns, *question(self.name, self.inputs, model)]


def kind_of(value):
    """"text", "pose" or "image"."""
    if isinstance(value, str):
        return "text"
    return "pose" if torch.is_tensor(value) else "image"


def count_inputs(kinds):
    """["pose", "text"] -> "1 pose and 1 text"; ["pose", "pose"] -> "2 poses"."""
    parts = []
    for kind, n in sorted(Counter(kinds).items()):
        parts.append(f"{n} {kind}s" if n > 1 else f"{n} {kind}")
    return " and ".join(parts) or "nothing"


# what can be asked alone: a turn of a conversation needs the turns before it
SINGLE_TASKS = {name: row for name, row in TASKS.items() if not row.turn}


def want_of(task):
    """What a task is answered with, "pose" or "text"; None: the model decides, as in `reason`.

    Where nobody in a picture fits the question, the answer is the text data.NOBODY, not a pose.
    """
    row = TASKS[task]
    return None if row.group and row.target == "pose" else row.target


def require_trained(stages, pose_head, questions):
    """Raises UserError unless a model that has been through `stages` can be asked questions."""
    for question in questions:
        with_thought = question.name in REASONING
        require_stages(stages, question.has_image, pose_head, with_thought)


def infer_task(kinds, task=""):
    """The task that takes inputs of exactly these kinds, such as ["pose", "text"].

    task: the user's choice, "" for none. Raises UserError if it does not fit, or if without it
    no task fits, or several.
    """
    fitting = [name for name, row in SINGLE_TASKS.items() if Counter(row.inputs) == Counter(kinds)]
    takes = {name: count_inputs(row.inputs) for name, row in SINGLE_TASKS.items()}
    given = count_inputs(kinds)

    validate_task(task)
    if task and task not in fitting:
        raise UserError(f"--task {task} takes {takes[task]}, but {given} was given")
    if task:
        return task

    if not fitting:
        tasks = "; ".join(f"{name} takes {takes[name]}" for name in takes)
        raise UserError(f"no task takes {given}: {tasks}")

    # `speculate` asks for the same as text2pose, in the same words
    distinct = {}
    for name in fitting:
        distinct.setdefault((templates(name)[0], TASKS[name].target), name)
    if len(distinct) > 1:
        choices = " or --task ".join(distinct.values())
        raise UserError(f"{given} fits several tasks: add --task {choices} (see --help)")
    return fitting[0]


def validate_task(task):
    """Raises UserError unless there is such a task that can be asked alone; "" stands for none."""
    if task in TASKS and task not in SINGLE_TASKS:
        raise UserError(f"--task {task} is a turn of a conversation; have one with --chat")
    if task and task not in TASKS:
        raise UserError(f"--task {task} is not one of {', '.join(SINGLE_TASKS)}")


def validate_text(text, flag="--text"):
    """Raises UserError if a text cannot be a question to any model."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{flag} is not valid UTF-8; check the encoding of the terminal") from None
    if not any(character.isalnum() for character in text):
        raise UserError(f"{flag} is empty or has no words; give a sentence such as "
                        "'Bend the left knee.'")


def match_slots(words, kinds):
    """The kinds of the slots in one's own words, in order. Raises UserError if others were given.

    kinds: of all inputs.
    """
    validate_text(words, "--ask")
    slots = []
    for slot in SLOT.findall(words):
        if slot not in ASK_SLOTS:
            raise UserError(f"--ask has {slot}, which is no slot: write {', '.join(ASK_SLOTS)} "
                            "where an input belongs")
        slots.append(ASK_SLOTS[slot])

    for slot, kind in ASK_SLOTS.items():
        if slots.count(kind) != kinds.count(kind):
            raise UserError(f"--ask has {slots.count(kind)} {slot} for {kinds.count(kind)} of "
                            f"--{kind}; write one {slot} in the place of each, in their order")
    return slots


def validate_length(model, text):
    """Raises UserError if a text is too long for the model."""
    n = len(model.text_ids(text))
    longest = model.llm.config.max_position_embeddings
    # beside the text a sequence may hold two pictures, poses, and the answer
    n_poses = 4 if model.has_codes else 1
    reserved = 2 * model.vision.n_patches + n_poses * model.pose_length
    if n + reserved > longest:
        raise UserError(f"the text has {n} words and marks, and the model reads {longest} tokens "
                        "in all; shorten it")


def report_unknown_words(model, text):
    """Prints a note on the words that the model does not know, each with the nearest known one, and
    one more where these are most of the words."""
    if not model.is_word_level:
        return

    words = dict.fromkeys(re.findall(r"[^\s.,?]+", normalise_text(text, model.words)))
    unknown = [word for word in words if word not in model.words]
    notes = []
    for word in unknown[:8]:
        nearest = difflib.get_close_matches(word, sorted(model.words), 1, 0.7)
        notes.append(f"{word} (nearest: {nearest[0]})" if nearest else word)
    if notes:
        print(f"note: the model does not know {len(unknown)} of the words: {', '.join(notes)}",
              file=sys.stderr)
    if 2 * len(unknown) > len(words):
        print("note: these are most of the words, so the answer has little to do with the text; "
              "ask in plain English", file=sys.stderr)


def check_typed(model, question):
    """Raises UserError if a question is too long for the model; prints unknown words."""
    validate_length(model, question.typed)
    report_unknown_words(model, question.typed)


def parse_box(box):
    """A person's box, four numbers or "X,Y,W,H" as typed -> its four numbers. Raises UserError."""
    typed = box if isinstance(box, str) else ",".join(map(str, box))
    try:
        box = [float(number) for number in typed.split(",")]
    except ValueError:
        box = []
    if len(box) != 4 or not all(math.isfinite(number) for number in box):
        raise UserError(f"--box {shorten(typed)} is not X,Y,W,H: left, top, width and height in "
                        "pixels, as in --box 40,10,120,300")

    _, _, width, height = box
    if min(width, height) <= 0 or max(width, height) < SMALLEST:
        raise UserError(f"--box {typed} is too small: give a width and a height above 0, one of "
                        f"them at least {SMALLEST} pixels")
    return box


def is_path(value):
    """Whether a value in Python is the path of a file, not what is in it."""
    return isinstance(value, (str, pathlib.Path))


def as_picture(value):
    """A path, a PIL picture or an array (H,W,3) uint8 -> PIL RGB picture. Raises UserError."""
    if is_path(value):
        return open_picture(value)
    with as_user_error("image is no picture (", "); give a path, a PIL picture or (H,W,3) uint8"):
        if not isinstance(value, Image.Image):
            value = Image.fromarray(np.asarray(value))
        if min(value.size) < SMALLEST:
            raise UserError(f"image is {value.width}x{value.height} pixels; give one with sides of "
                            f"at least {SMALLEST} pixels")
        return to_rgb(value)


def read_pictures(images, boxes):
    """Pictures, or what their boxes cut out of them; boxes: none, or one of each picture."""
    if boxes and len(boxes) != len(images):
        raise UserError(f"--box was given {len(boxes)} times and --image {len(images)} times; give "
                        "one box for each picture, in the same order")

    boxes = [parse_box(box) for box in boxes]
    pictures = [as_picture(image) for image in images]
    for k, box in enumerate(boxes):
        try:
            pictures[k] = square(pictures[k], box)
        except UserError as error:
            raise UserError(f"--image {images[k]}: {error}") from None
    return pictures


def as_pose(value, up):
    """A path, or the numbers of a pose -> rotmat (22,3,3). Raises UserError.

    A path is read as `read_pose` does, and numbers as `as_rotations` does: y is up.
    """
    if not is_path(value):
        return as_rotations(torch.as_tensor(value).detach().cpu().numpy(), "pose")

    other = upright_reading(value, up)
    if other:
        print(f"note: {value} is read with the head below the feet; with --up {other} the person "
              "would be upright", file=sys.stderr)
    return read_pose(value, up)


def read_poses(values, up):
    """Poses (22,3,3), of files or numbers, of people who face front, as texts describe them.

    If A and B are of one sequence, B gets the turn of A, so that its heading beside A's stays; else
    each faces front by itself (the rule of PoseFix, which train.RealData follows as well).
    """
    poses = [as_pose(value, up)[None] for value in values]                      # (1,22,3,3) each
    if are_two_sequences(values):
        return [face_front(pose)[0] for pose in poses]
    return [face_front(pose, like=poses[0])[0] for pose in poses]


def are_two_sequences(values):
    """Whether poses are frames of two motions: walk.npz:3 and run.npz:7.

    Two files of a single pose do not say what they are of, nor do numbers. They count as one
    sequence, or two poses of somebody who lies on the side could come out half a turn apart (see
    `face_front`).
    """
    motions = set()
    for value in values:
        if is_path(value):
            file, frame = split_pose_path(value)
            if frame:
                motions.add(pathlib.Path(file).resolve())
    return len(motions) == 2


def as_list(value):
    """None -> []; one value -> a list of it; a list or a tuple -> a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


MOST_INPUTS = {"text": 1, "image": 2, "pose": 2}


def read_question(text=None, image=None, pose=None, task="", box=None, up="", ask=""):
    """Whatever is asked, in Python, in a line of a file or on the command line -> Question.

    text, image, pose, box: one, or a list. image: see `as_picture`; pose: see `as_pose`; box: see
    `parse_box`. task: "" if the inputs leave no choice. ask: one's own words, see `own_question`;
    then `task` only says whether a pose or a text is wanted. Raises UserError.
    """
    given = {"text": as_list(text), "image": as_list(image), "pose": as_list(pose)}
    kinds = []
    for kind, values in given.items():
        if len(values) > MOST_INPUTS[kind]:
            raise UserError(f"{len(values)} {kind}s were given; a question takes at most "
                            f"{MOST_INPUTS[kind]}")
        kinds += [kind] * len(values)

    if ask:
        validate_task(task)
        name = "ask"
        want = want_of(task) if task else None
        order = match_slots(ask, kinds)
    else:
        name = infer_task(kinds, task)
        want = want_of(name)
        order = TASKS[name].inputs

    for text in given["text"]:
        validate_text(text)
    given["image"] = read_pictures(given["image"], as_list(box))
    given["pose"] = read_poses(given["pose"], up)
    inputs = [given[kind].pop(0) for kind in order]
    return Question(name, inputs, want, ask)


def answer_questions(model, questions, decode="argmax", temperature=0.0, generator=None, n=1):
    """Answers a batch of Question -> list of Answer; see `generate`."""
    validate_decoding(model, decode)
    require_trained(model.stages, model.config["pose_head"], questions)
    prompts = [question.prompt(model) for question in questions]
    wants = [question.want for question in questions]
    return generate(model, prompts, wants, decode, temperature, generator, n=n)


# ---- 4. Pictures ---------------------------------------------------------------------------------
def named_cells(inputs, results):
    """All that is shown of a question: its inputs under their names, then its results."""
    names = [kind_of(value) for value in inputs]
    if names in (["pose", "pose"], ["image", "image"]):
        names = ["A", "B"]
    return [*zip(names, inputs), *results]


def first_heading(inputs):
    """How far people are turned in pictures of a question: radians, for `render`."""
    # half turned, so that depth shows; beside a photograph from the side of its camera
    has_image = any(kind_of(value) == "image" for value in inputs)
    return 0.0 if has_image else -0.5


def sheet_row(task, note, inputs, results, body):
    """One row of `contact_sheet`: task and note on the left, then the inputs, then the results.

    inputs: texts, pictures and poses; results: [(name, value), ...]. A pose (22,3,3) is drawn.
    """
    cells = []
    for name, value in named_cells(inputs, results):
        if torch.is_tensor(value):
            value = draw_pose(value, body, first_heading(inputs))
        if isinstance(value, Image.Image):
            value = square(value)       # the sheet would cut off the ends of a long one
        cells.append((name, value))
    return f"{task}\n{note}", cells


def next_number(out, name):
    """The number after those of all files in the folder `out` that `numbered` named `name`."""
    highest = 0
    for path in out.glob(f"{name}*"):
        match = re.fullmatch(rf"{name}(?:_(\d+))?", path.stem)
        if match:
            highest = max(highest, int(match[1] or 1))
    return highest + 1


def numbered(name, number):
    """The name of a written file: "tour", "tour_2", "tour_3" and so on."""
    return name if number == 1 else f"{name}_{number}"


# ---- 5. Files for other programs -----------------------------------------------------------------
def write_npz(path, poses, body, fps):
    """AMASS: axis-angles, z up. `data.read_pose` reads it back."""
    write_pose(path, poses, fps)


def write_text(path, text):
    """Writes a text file, whole or not at all. Raises UserError."""
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path, poses, body, fps):
    """The joints of each frame, (F,22,3): metres, y up, pelvis at 0."""
    joints = body.joints(poses).double().numpy()                                # (F,22,3)
    content = {
        "names": JOINTS,
        "parents": PARENTS,
        "frames_per_second": fps,
        "joints": joints.round(6).tolist(),
    }
    write_text(path, json.dumps(content, allow_nan=False) + "\n")


def write_obj(path, poses, body, fps):
    """The posed mesh of one pose: metres, y up, pelvis at 0."""
    _, vertices = body(poses)                                                   # (1,V,3)
    lines = ["# metres, y up"]
    for x, y, z in vertices[0].tolist():
        lines.append(f"v {x:.6f} {y:.6f} {z:.6f}")
    for a, b, c in (body.faces + 1).tolist():           # counted from 1
        lines.append(f"f {a} {b} {c}")
    write_text(path, "\n".join(lines) + "\n")


# BVH: a skeleton as text, then the angles of one frame a line
def euler_zxy(rotations):
    """Rotation matrices (...,3,3) -> angles z, x, y (...,3) in radians: R = Rz Rx Ry."""
    row_0, row_1, row_2 = np.moveaxis(rotations, -2, 0)                         # (...,3) each
    z = np.arctan2(-row_0[..., 1], row_1[..., 1])
    x = np.arctan2(row_2[..., 1], np.hypot(row_0[..., 1], row_1[..., 1]))

    # y of Rz⁻¹ R = Rx Ry: where x is a quarter turn, z is anything, and y makes up for it
    row_0 = np.cos(z)[..., None] * row_0 + np.sin(z)[..., None] * row_1
    y = np.arctan2(row_0[..., 2], row_0[..., 0])
    return np.stack([z, x, y], -1)


def bones(body):
    """The way to each joint from its parent in the T-pose, (22,3) metres."""
    way = body.rest - body.rest[PARENTS]
    way[0] = body.rest[0]               # the pelvis has no parent
    return way


def joints_below(joint):
    """The joints that hang on a joint."""
    return [below for below, parent in enumerate(PARENTS) if parent == joint]


def depth_first(joint=0):
    """A joint and all below it, in the order of a BVH file."""
    order = [joint]
    for below in joints_below(joint):
        order += depth_first(below)
    return order


def bvh_joint(joint, offsets):
    """The lines of a BVH's HIERARCHY for a joint and all below it. offsets (22,3): centimetres."""
    kind = "JOINT"
    channels = "3 Zrotation Xrotation Yrotation"
    if joint == 0:
        kind = "ROOT"
        channels = "6 Xposition Yposition Zposition Zrotation Xrotation Yrotation"

    inside = [bvh_offset(offsets[joint]), f"CHANNELS {channels}"]
    for below in joints_below(joint):
        inside += bvh_joint(below, offsets)
    if not joints_below(joint):
        # the body has no joint at fingertips, toes and crown: half a bone for programs to draw
        inside += ["End Site", "{", "\t" + bvh_offset(offsets[joint] / 2), "}"]
    return [f"{kind} {JOINTS[joint]}", "{", *["\t" + line for line in inside], "}"]


def bvh_offset(offset):
    """The line of a BVH that places a joint beside its parent."""
    return "OFFSET " + " ".join(f"{number:.6f}" for number in offset)


def write_bvh(path, poses, body, fps):
    """BVH: centimetres, y up, degrees, each joint turned about z, then x, then y: R = Rz Rx Ry.

    The rest pose is the T-pose; the pelvis stays at 0.
    """
    offsets = 100 * bones(body).double().numpy()                                # (22,3)
    rotations = poses[:, depth_first()].double().numpy()                        # (F,22,3,3)
    angles = np.unwrap(euler_zxy(rotations), axis=0)    # no jumps from 180 to -180 degrees
    angles = np.rad2deg(angles).reshape(len(poses), -1)                         # (F,66)

    lines = ["HIERARCHY", *bvh_joint(0, offsets)]
    lines += ["MOTION", f"Frames: {len(poses)}", f"Frame Time: {1 / fps:.8f}"]
    for frame in angles.tolist():
        numbers = " ".join(f"{angle:.6f}" for angle in frame)
        lines.append(f"0 0 0 {numbers}")
    write_text(path, "\n".join(lines) + "\n")


# Binary glTF 2.0: JSON that describes the scene, then the arrays that it refers to
COMPONENT_TYPES = {"uint8": 5121, "uint32": 5125, "float32": 5126}
ELEMENT_TYPES = {(): "SCALAR", (3,): "VEC3", (4,): "VEC4", (4, 4): "MAT4"}
VERTICES = 34962                # what an array is to the graphics card
TRIANGLES = 34963


class GlbArrays:
    """The arrays of a .glb, one behind the other, and what its JSON says about each."""

    def __init__(self):
        self.content = bytearray()
        self.views = []
        self.accessors = []

    def add(self, array, target=None):
        """Appends an array (n,...), whose rows fill multiples of 4 bytes -> its number."""
        view = {"buffer": 0, "byteOffset": len(self.content), "byteLength": array.nbytes}
        if target:
            view["target"] = target
        self.accessors.append({
            "bufferView": len(self.views),
            "componentType": COMPONENT_TYPES[array.dtype.name],
            "count": len(array),
            "type": ELEMENT_TYPES[array.shape[1:]],
            "min": array.min(0).ravel().tolist(),
            "max": array.max(0).ravel().tolist(),
        })
        self.views.append(view)
        self.content += array.tobytes()
        return len(self.accessors) - 1


def four_weights(body):
    """Which four of the 22 joints move each vertex most, and how much: (V,4) each; sums are 1."""
    weights = body.weights[:, :22].double()                                     # (V,22)
    weights[:, LEFT_WRIST] += body.weights[:, 22]       # hands are rigid and move with the wrists
    weights[:, RIGHT_WRIST] += body.weights[:, 23]
    largest, joints = weights.topk(4)                                           # (V,4) each
    largest = largest / largest.sum(1, keepdim=True)
    joints = joints.masked_fill(largest == 0, 0)        # glTF wants joint 0 where nothing pulls
    return joints.numpy().astype(np.uint8), largest.numpy().astype(np.float32)


def glb_mesh(arrays, body):
    """The mesh of a body in its rest pose, as glTF describes it."""
    template = body.template.double().numpy()                                   # (V,3)
    normals = vertex_normals(template, body.faces.numpy())                      # (V,3)
    normals[~normals.any(1)] = [0, 1, 0]                # of vertices without a triangle
    linear = body_colors(body) ** 2.2                   # colours of vertices have no gamma in glTF
    joints, weights = four_weights(body)

    attributes = {
        "POSITION": arrays.add(template.astype(np.float32), VERTICES),
        "NORMAL": arrays.add(normals.astype(np.float32), VERTICES),
        "COLOR_0": arrays.add(linear.astype(np.float32), VERTICES),
        "JOINTS_0": arrays.add(joints, VERTICES),
        "WEIGHTS_0": arrays.add(weights, VERTICES),
    }
    indices = arrays.add(body.faces.numpy().astype(np.uint32).ravel(), TRIANGLES)
    return {"primitives": [{"attributes": attributes, "indices": indices, "material": 0}]}


def glb_skin(arrays, body):
    """The skin of a mesh whose joints are the nodes 0-21."""
    inverses = np.tile(np.eye(4, dtype=np.float32), (len(JOINTS), 1, 1))        # (22,4,4)
    inverses[:, 3, :3] = -body.rest.numpy()             # stored column by column
    return {"joints": list(range(len(JOINTS))), "inverseBindMatrices": arrays.add(inverses)}


def glb_joints(quaternions, body):
    """The nodes of the 22 joints, turned by quaternions (22,4), x y z w."""
    nodes = []
    translations = bones(body)                                                  # (22,3)
    for joint, name in enumerate(JOINTS):
        node = {
            "name": name,
            "translation": translations[joint].tolist(),
            "rotation": quaternions[joint].tolist(),
        }
        if joints_below(joint):
            node["children"] = joints_below(joint)
        nodes.append(node)
    return nodes


def glb_animation(arrays, quaternions, fps):
    """The animation that turns the 22 joints by quaternions (F,22,4), x y z w."""
    times = arrays.add(np.arange(len(quaternions), dtype=np.float32) / np.float32(fps))
    samplers = []
    channels = []
    for joint in range(len(JOINTS)):
        turns = arrays.add(quaternions[:, joint])                               # (F,4)
        samplers.append({"input": times, "output": turns})
        channels.append({"sampler": joint, "target": {"node": joint, "path": "rotation"}})
    return {"samplers": samplers, "channels": channels}


def write_glb(path, poses, body, fps):
    """Binary glTF 2.0: the rigged body in its first pose, animated if there are several.

    Metres, y up, pelvis at 0; rotations only, so the pelvis stays there. Skinning is linear: the
    pose correctives of a body that has some (SMPL; not the free one) cannot be expressed, and
    elbows and knees crease a little more than in .obj.
    """
    quaternions = matrix_to_quaternion(poses.double()).roll(-1, -1)             # x y z w
    quaternions = quaternions.float().numpy()                                   # (F,22,4)

    arrays = GlbArrays()
    person = {"name": body.name or "body", "mesh": 0, "skin": 0}
    gltf = {
        "asset": {"version": "2.0", "generator": "UniPose"},
        "scene": 0,
        "scenes": [{"nodes": [0, len(JOINTS)]}],        # the pelvis, and the mesh on the skeleton
        "nodes": [*glb_joints(quaternions[0], body), person],
        "meshes": [glb_mesh(arrays, body)],
        "skins": [glb_skin(arrays, body)],
        "materials": [{"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 0.9}}],
    }
    if len(poses) > 1:
        gltf["animations"] = [glb_animation(arrays, quaternions, fps)]
    gltf["accessors"] = arrays.accessors
    gltf["bufferViews"] = arrays.views
    gltf["buffers"] = [{"byteLength": len(arrays.content)}]

    text = json.dumps(gltf, allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    n_bytes = 12 + 8 + len(text) + 8 + len(arrays.content)
    with atomic_write(path) as new, open(new, "wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, n_bytes))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(arrays.content), b"BIN\0") + arrays.content)


# OpenPose: what ControlNet reads, 18 keypoints in pixels
CANVAS = 512                    # pixels of its sides
KEYPOINTS = [
    "nose", "neck",
    "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
]
FACE = {                        # metres from the head joint in the T-pose, as on the free body
    "nose": (0.0, 0.055, 0.123),
    "right_eye": (-0.032, 0.090, 0.100),
    "left_eye": (0.032, 0.090, 0.100),
    "right_ear": (-0.085, 0.075, 0.0),
    "left_ear": (0.085, 0.075, 0.0),
    "between_ears": (0.0, 0.075, 0.0),                  # inside of the head, no keypoint
}
BEHIND = 0.03                   # metres behind `between_ears` from which the head hides a point


def keypoints(pose, body):
    """A pose (22,3,3) -> where its KEYPOINTS are, and last `between_ears`: (19,3) metres."""
    rotations, joints = global_transforms(pose, body.rest)                      # (22,3,3|3)
    places = dict(zip(JOINTS, joints))
    places["neck"] = (places["left_shoulder"] + places["right_shoulder"]) / 2   # as COCO has it
    for name, offset in FACE.items():
        places[name] = joints[HEAD] + rotations[HEAD] @ torch.tensor(offset)
    return torch.stack([places[name] for name in [*KEYPOINTS, "between_ears"]])


def write_openpose(path, poses, body, fps):
    """One person as ControlNet's OpenPose JSON: COCO's 18 keypoints on a square canvas.

    From the front, framed as `render` frames the body. Confidence is 1, or 0 for a point of the
    face that the head hides; that other parts of the body hide something does not count.
    """
    _, vertices = body(poses)                                                   # (1,V,3)
    points = keypoints(poses[0], body).numpy()                                  # (19,3)
    pixels, depth = project(points, vertices[0].numpy(), CANVAS, 1.0, (0.0, 0.0))

    numbers = []
    for name, (x, y), z in zip(KEYPOINTS, pixels.tolist(), depth):
        if name in FACE and z < depth[-1] - BEHIND:
            numbers += [0.0, 0.0, 0.0]
        else:
            numbers += [round(x, 2), round(y, 2), 1.0]  # ControlNet drops all below 1
    person = {
        "pose_keypoints_2d": numbers,
        "face_keypoints_2d": [],
        "hand_left_keypoints_2d": [],
        "hand_right_keypoints_2d": [],
    }
    content = {"people": [person], "canvas_width": CANVAS, "canvas_height": CANVAS}
    write_text(path, json.dumps(content, allow_nan=False) + "\n")


class Writer(NamedTuple):
    """How a kind of file is written."""

    write: Callable             # (path, poses (F,22,3,3), body, fps)
    has_mesh: bool = False      # it contains the mesh of the body
    one_pose: bool = False      # it has no room for a motion


WRITERS = {                     # the end of a file's name: what writes it
    ".npz": Writer(write_npz),
    ".glb": Writer(write_glb, has_mesh=True),
    ".bvh": Writer(write_bvh),
    ".obj": Writer(write_obj, has_mesh=True, one_pose=True),
    ".openpose.json": Writer(write_openpose, one_pose=True),
    ".json": Writer(write_json),                        # after the longer suffix that ends alike
}


def suffix_of(path):
    """The key of WRITERS that a file's name ends in, in any case; "" if there is none."""
    name = pathlib.Path(path).name.lower()
    for suffix in WRITERS:
        if name.endswith(suffix) and name != suffix:
            return suffix
    return ""


def validate_save(path, body, mesh=False, n_frames=1):
    """Raises UserError if `save_poses` would refuse these arguments; to be called before long work.

    n_frames: how many poses there will be.
    """
    suffix = suffix_of(path)
    if not suffix:
        raise UserError(f"--save {path}: its name must end in one of {', '.join(WRITERS)}, which "
                        "says what is written")
    writer = WRITERS[suffix]
    if writer.has_mesh and not body.is_free and not mesh:
        others = [other for other, row in WRITERS.items() if not row.has_mesh]
        raise UserError(f"--save {path}: a {suffix} contains the mesh of the body {body.name}, "
                        "which its licence may not let you pass on; add --mesh to write it all the "
                        f"same, leave out --body, or save as {', '.join(others)}")
    if writer.one_pose and n_frames > 1:
        others = [other for other, row in WRITERS.items() if not row.one_pose]
        raise UserError(f"--save {path}: a {suffix} holds one pose, and there are {n_frames}; save "
                        f"one of them, or all as {', '.join(others)}")
    validate_writable("--save", path)


def save_poses(path, poses, body, mesh=False, fps=30.0):
    """Writes poses (22,3,3), or the frames (F,22,3,3) of a motion, as the suffix of `path` says.

    body: a Body on the CPU. mesh: write its mesh even if it is not free, where the file has one.
    fps: frames per second, above 0. Raises UserError for what `validate_save` refuses, and if the
    disk is full.
    """
    poses = poses.detach().cpu().float().reshape(-1, 22, 3, 3)                  # (F,22,3,3)
    validate_save(path, body, mesh, len(poses))
    WRITERS[suffix_of(path)].write(path, poses, body, fps)


# ---- 6. A page to look at ------------------------------------------------------------------------
MAX_PAGE_ANSWERS = 64       # of 55 kB each
PAGE_PICTURE = (640, 640)   # pixels that a picture in a page has at most


def validate_page(path, n_answers, body, mesh=False):
    """Raises UserError if `write_page` would refuse these arguments; to be called before long work.

    n_answers: how many results all its rows will have together.
    """
    if pathlib.Path(path).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--show {path} would not open in a browser; give it a name that ends in "
                        ".html")
    if n_answers > MAX_PAGE_ANSWERS:
        raise UserError(f"--show {path} would hold {n_answers} answers; ask for at most "
                        f"{MAX_PAGE_ANSWERS}")
    if not body.is_free and not mesh:
        raise UserError(f"--show {path}: a page contains the mesh of the body {body.name}, which "
                        "its licence may not let you pass on; add --mesh to write it all the same, "
                        "or leave out --body")
    validate_writable("--show", path)


def write_page(path, rows, body, mesh=False):
    """Writes a page that shows people to turn with the mouse, beside texts and pictures.

    It is one file, assets/page.html with its content filled in, and loads nothing from elsewhere.
    rows: of each question (task, note, inputs, results), as `sheet_row` takes them. body: a Body on
    the CPU. mesh: write its mesh even if it is not free. Raises UserError for what `validate_page`
    refuses, and if the disk is full.
    """
    n_answers = sum(len(results) for _, _, _, results in rows)
    validate_page(path, n_answers, body, mesh)

    page_rows = []
    for task, note, inputs, results in rows:
        cells = []
        for name, value in named_cells(inputs, results):
            cells.append({"name": name, **page_value(value, body)})
        heading = first_heading(inputs)
        page_rows.append({"title": task, "note": note, "heading": heading, "cells": cells})

    colors = body_colors(body)[body.faces].mean(1)                              # (F,3)
    content = json.dumps({
        "faces": encode_array(body.faces.numpy(), "<u4"),
        "colors": encode_array(255 * colors, "u1"),
        "sides": {side: (255 * np.array(color)).tolist() for side, color in SIDE_TINTS.items()},
        "rows": page_rows,
    })
    content = content.replace("<", r"\u003c")   # else a text could end the script that it is in

    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    write_text(path, template.replace("{{content}}", content))


def page_value(value, body):
    """A text, a picture or a pose (22,3,3) as a page holds it: {kind: text}."""
    if isinstance(value, str):
        return {"text": value or "(no text)"}

    if torch.is_tensor(value):
        with torch.no_grad():
            _, vertices = body(value[None])                                     # (1,V,3)
        return {"vertices": encode_array(vertices[0].numpy(), "<f4")}

    if isinstance(value, np.ndarray):
        value = Image.fromarray(value)
    picture = to_rgb(value)
    picture.thumbnail(PAGE_PICTURE)
    jpeg = io.BytesIO()
    picture.save(jpeg, format="JPEG", quality=90)
    return {"picture": "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()}


def encode_array(array, dtype):
    """The numbers of an array, as base64 text of their bytes."""
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


# ---- 7. The tour ---------------------------------------------------------------------------------
def tour_tasks(model):
    """The tasks that show what a model can do: all, or the seven if it has not learned the rest."""
    has_learned_all = model.stages is None or "reason" in model.stages
    return answerable(TASKS if has_learned_all else SEVEN, model.config["pose_head"])


def tour_question(world, task, i, reads_poses):
    """What the tour asks about person i -> (Question, its target). reads_poses: see `history`."""
    rng = np.random.default_rng((0, i))
    earlier = []
    if TASKS[task].turn:
        for past, person in world.history(task, i, rng, reads_poses):
            *inputs, target = world.example(past, person, rng)
            if TASKS[past].frame == "camera":
                target = world.poses[person]            # a later turn is about it
            earlier.append((Question(past, inputs, want_of(past)), target))

    *inputs, target = world.example(task, i, rng)
    return Question(task, inputs, want_of(task), earlier=tuple(earlier)), target


def tour_people(world, task, i):
    """Whom the target of `tour_question` is about: one pose (22,3,3), or those of A and B."""
    if not TASKS[task].group:
        return [world.poses[person] for person in world.subjects(task, i)]

    group = world.group_of(i)
    asked = world.question(group, np.random.default_rng((0, i)), TASKS[task].target)
    return [world.poses[group.people[asked.person]]]


def tour(model, body, config):
    """Answers all its tasks in one batch: task k about the k-th pair of the test split."""
    tasks = tour_tasks(model)
    n_people = max(POOL, 2 * len(TASKS))                # a group needs a pool of people
    world = World("test", n_people, model.vision.clip_size)
    out = pathlib.Path(config.out)
    questions = []
    targets = []
    for k, task in enumerate(tasks):
        question, target = tour_question(world, task, 2 * k, model.has_codes)
        questions.append(question)
        targets.append(target)

    start = time.perf_counter()
    answers = answer_questions(model, questions, config.decode)
    seconds = time.perf_counter() - start

    rows = []
    for k, (task, question) in enumerate(zip(tasks, questions)):
        answer = answers[k]
        target = targets[k]
        _, note = rate(task, answer.value, target, tour_people(world, task, 2 * k), body)
        for number, (asked, value) in enumerate(question.earlier, 1):
            rows.append((task, f"turn {number}", asked.shown, [("answer", value)]))
        results = [("answer", answer.value), ("target", target)]
        rows.append((task, note, question.shown, results))

        print(f"\n{task}   {note}")
        for value in question.shown:
            if isinstance(value, str):
                print_labelled("question", value)
        if answer.pose is None:
            print_labelled("answer", answer.text)
        else:
            path = out / f"{numbered(task, next_number(out, task))}.npz"
            write_pose(path, answer.pose)
            print_labelled("answer", str(path))

    path = out / f"{numbered('tour', next_number(out, 'tour'))}.png"
    save_png(contact_sheet([sheet_row(*row, body) for row in rows]), path)
    print(f"\n{len(tasks)} answers in {seconds:.1f} s, as one batch; look at {path}")
    show_rows(rows, body, config)


def print_labelled(label, text):
    """Prints a text behind a label, wrapped to lines that are indented alike."""
    text = text or "(nothing)"
    print(textwrap.fill(text, 100, initial_indent=f"    {label:<10}", subsequent_indent=" " * 14))


def rate(task, answer, target, poses, body):
    """How wrong an answer is, as a number and in words: the joint error of a pose, or how many
    statements of a text hold.

    answer, target: a pose (22,3,3) or a text. poses: the person that the text is about, or A and B.
    """
    if TASKS[task].target == "pose":
        if kind_of(answer) == "text":
            return math.inf, "no pose"
        offsets = body.joints(answer) - body.joints(target)                     # (22,3) metres
        error = 1000 * offsets.norm(dim=-1).mean().item()
        return error, f"MPJPE {error:.0f} mm"

    source = poses[0] if len(poses) == 2 else None
    text = drop_introduction(answer) if TASKS[task].group else answer
    verdicts = check_text(text, poses[-1], source)
    n_true = sum(is_near for is_near, _ in verdicts)
    return 1 - n_true / max(1, len(verdicts)), f"{n_true}/{len(verdicts)} statements true"


# ---- 8. A conversation ---------------------------------------------------------------------------
TURN_FILE = re.compile(r"<(image|pose) +([^<>]*[^<> ]) *>")


def read_turn(line, up=""):
    """A turn as it is typed -> Question. Raises UserError.

    <image PATH> and <pose PATH> stand for files. up: see `read_pose`.
    """
    validate_text(line, "the turn")
    mark = re.search(r"<[a-z][^<>]*(>?)", TURN_FILE.sub(" ", line), re.I)
    if mark and not mark[1]:
        raise UserError(f"the turn ends in the middle of {shorten(mark[0])}; close it with >, as "
                        "in <image photo.jpg>")
    if mark:
        raise UserError(f"{shorten(mark[0])} in the turn stands for no file; write <image PATH> or "
                        "<pose PATH>")

    paths = {"image": [], "pose": []}
    for kind, path in TURN_FILE.findall(line):
        paths[kind].append(os.path.expanduser(path))
    words = TURN_FILE.sub(r"<\1>", line.strip())
    return read_question(**paths, up=up, ask=words)._replace(name="chat")


class Conversation:
    """Questions to one model, each of which may refer to those before it and to their answers.

    earlier: the turns that it remembers, see `Question`.
    """

    def __init__(self, model, decode="argmax", temperature=0.0, generator=None):
        """decode, temperature: see `Engine`. Raises UserError if the model has not learned this."""
        validate_decoding(model, decode)
        require_stages(model.stages, True, model.config["pose_head"], with_thought=True)
        self.model = model
        self.decode = decode
        self.temperature = temperature
        self.generator = generator
        self.earlier = []

    def ask(self, turn):
        """A turn, as typed (see `read_turn`) or a Question -> Answer. Raises UserError.

        The model decides whether it answers with a pose or a text. A turn that cannot be asked
        leaves the conversation as it was.
        """
        question = read_turn(turn) if isinstance(turn, str) else turn
        check_typed(self.model, question)
        self.make_room(question)
        whole = question._replace(earlier=tuple(self.earlier))
        [answer] = answer_questions(
            self.model, [whole], self.decode, self.temperature, self.generator)

        value = answer.value
        if question.has_image and answer.pose is not None:
            [value] = face_front(answer.pose[None])     # only then is it in the camera's frame
        self.earlier.append((question, value))
        return answer

    def make_room(self, question):
        """Drops the oldest turns, so that the others, a question and its answer fit the model.

        Raises UserError if the question alone does not fit.
        """
        room = self.model.llm.config.max_position_embeddings - longest_answer(self.model)
        n_dropped = 0
        while True:
            whole = question._replace(earlier=tuple(self.earlier[n_dropped:]))
            n_tokens = len(self.model.encode(whole.prompt(self.model)).ids)
            if n_tokens <= room:
                break
            if not whole.earlier:
                raise UserError(f"the turn has {n_tokens} tokens, and the model reads {room} "
                                "beside its answer; shorten it")
            n_dropped += 1

        if n_dropped:
            print(f"note: the model reads {room} tokens beside its answer; it forgets the oldest "
                  f"{n_dropped} of {len(self.earlier)} turns", file=sys.stderr)
            self.earlier = self.earlier[n_dropped:]


def typed_turns():
    """The lines that are typed at a prompt, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then has a history; not on Windows
    print("one turn a line; <image PATH> and <pose PATH> stand for files; Ctrl-D ends it")
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
    print()


def chat(model, body, config):
    """Has a conversation: turns are typed at a prompt, or come one a line from standard input.

    What is wrong with a typed turn is said, and the conversation goes on. Raises UserError if a
    line of another input cannot be a turn, after those before it have been answered.
    """
    generator = torch.Generator(model.device).manual_seed(config.seed)
    conversation = Conversation(model, config.decode, config.temperature, generator)
    is_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")     # `validate_text` refuses what is left

    rows = []
    try:
        for number, line in enumerate(typed_turns() if is_terminal else sys.stdin, 1):
            try:
                question = read_turn(line, config.up)
                answer = conversation.ask(question)
                rows.append(write_answers(question, [answer], body, config, number))
            except UserError as error:
                if not is_terminal:
                    raise UserError(f"line {number} of standard input: {error}") from None
                print(f"error: {error}", file=sys.stderr)
    finally:
        if rows:
            show_rows(rows[-MAX_PAGE_ANSWERS:], body, config)
    if not rows and not is_terminal:
        raise UserError(
            "standard input holds no turn; write one a line, such as 'Bend the left knee.'")


# ---- 9. Many questions ---------------------------------------------------------------------------
def read_motions(config):
    """--pose and --every -> what is asked of each frame, a list of Question. Raises UserError.

    One motion is described frame by frame; of two, A and B, each frame of A is told how to become
    the frame of B with the same number: an attempt comes before its model.
    """
    motions = []
    rates = []
    for path in config.pose:
        frames, rate = read_frames(path, config.every, config.up)               # (T,22,3,3)
        motions.append(face_front(frames))
        rates.append(rate)
        if uprightness(frames[0]) < 0:
            print(f"note: {path} begins with the head below the feet; --up says which way is up",
                  file=sys.stderr)

    n_frames = min(map(len, motions))
    if n_frames < max(map(len, motions)):
        last = (n_frames - 1) * config.every
        print(f"note: one motion is longer; they are compared up to frame {last}", file=sys.stderr)
    if rates[0] != rates[-1]:
        print(f"note: the motions have {rates[0]:g} and {rates[-1]:g} frames per second; frames of "
              "the same number are compared, not of the same time", file=sys.stderr)

    questions = []
    for k in range(n_frames):
        frame = k * config.every
        seconds = f" ({frame / rates[0]:.1f} s)" if rates[0] else ""
        question = read_question(pose=[frames[k] for frames in motions], task=config.task)
        questions.append(question._replace(label=f"frame {frame}{seconds}"))
    return questions


def answer_motion(model, body, config, questions):
    """Prints what the model says of each frame, a line each. questions: see `read_motions`."""
    rows = []
    for start in range(0, len(questions), config.batch):
        batch = questions[start:start + config.batch]
        for question, answer in zip(batch, answer_questions(model, batch, config.decode)):
            print(f"{question.label}: {answer.text}", flush=True)
            report_cut(answer)
            results = [("answer", answer.text)]
            rows.append((question.name, question.label, question.shown, results))
    show_rows(rows, body, config)


def parse_line(line):
    """A line with a JSON object -> dict; any other line -> its text."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else line.decode("utf-8", "replace")


def read_lines(path):
    """A file of questions -> [(number, content), ...], its lines counted from 1. Raises UserError.

    content: see `parse_line`. Empty lines are left out.
    """
    require_file(path)
    lines = []
    for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(), 1):
        if line.strip():
            lines.append((number, parse_line(line)))
    if not lines:
        raise UserError(f"--jsonl {path} is empty; write one question a line, such as {EXAMPLE}")
    return lines


def asks_image(content):
    """Whether a line of a file of questions is about a picture. content: see `parse_line`."""
    return isinstance(content, dict) and bool(content.get("image"))


EXAMPLE = '{"text": "The left knee is bent."}'
QUESTION_KEYS = {
    "task": str, "text": str, "ask": str, "up": str, "image": [str], "pose": [str],
}


def line_question(content, folder):
    """What a line of a file of questions asks -> Question. Raises UserError.

    content: see `parse_line`. folder: where its paths begin.
    """
    if not isinstance(content, dict):
        raise UserError(f"the line is no JSON object, such as {EXAMPLE}")

    fields = dict(content)
    fields.pop("id", None)              # for whoever reads the answers
    box = fields.pop("box", None)
    if isinstance(box, list) and len(box) == 4:
        box = [box]                     # of one picture
    for key in ("image", "pose"):
        fields[key] = as_list(fields.get(key))
    check_entries(fields, QUESTION_KEYS, "the question:")
    validate_up(fields.get("up", ""))

    for key in ("image", "pose"):
        fields[key] = [str(folder / path) for path in fields[key]]
    return read_question(**fields, box=box)


ROW_START = b'{"line": '         # of every row of a file of answers


class AnswerFile:
    """A file of answers, one row of JSON a line: what an earlier run left in it, and how it grows.

    stamp: what its answers come from, a part of each row. rows: those that it holds. end: its
    length in bytes up to the end of the last of them; a run that was cut may have left a torn row.
    """

    def __init__(self, path, notes, decode):
        """notes: the config of the model, see `read_config`. Raises UserError."""
        text = json.dumps(notes, sort_keys=True, default=str)
        weights = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.stamp = {"weights": weights, "decode": decode}
        self.path = pathlib.Path(path)
        content = b""
        if self.path.exists():
            require_file(path)
            content = self.path.read_bytes()

        self.end = content.rfind(b"\n") + 1
        self.rows = [parse_line(line) for line in content[:self.end].splitlines()]
        are_rows = all(isinstance(row, dict) and "line" in row for row in self.rows)
        torn = content[self.end:][:len(ROW_START)]
        if not are_rows or not ROW_START.startswith(torn):
            raise UserError(f"--out {path} is no file of answers; name another file")

    def unanswered(self, lines):
        """The lines of a file of questions that it has no row of yet, see `read_lines`.

        Raises UserError if its rows are not about the first of these lines, by the same model.
        """
        advice = f"name another file than --out {self.path}, or delete it"
        for k, row in enumerate(self.rows):
            number, content = lines[k] if k < len(lines) else (0, "")
            is_same = json.dumps(row.get("question")) == json.dumps(content)
            if row["line"] != number or not is_same:
                raise UserError(f"row {k + 1} of the answers is not about question {k + 1} of the "
                                f"file; {advice}")
            stamp = {key: row.get(key) for key in self.stamp}
            if "error" not in row and stamp != self.stamp:
                raise UserError(f"row {k + 1} of the answers comes from other weights or another "
                                f"--decode; {advice}")
        return lines[len(self.rows):]

    def append(self, rows):
        """Writes rows behind those that it holds, all or none. Raises UserError on a full disk."""
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self.end)
                file.write(lines)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.end)
            raise UserError(explain_write_error(self.path, error)) from error
        self.end += len(lines)


def answer_lines(model, lines, config, stamp):
    """A batch of lines of a file of questions -> their rows of the file of answers, in order.

    A line that cannot be asked gets a row with its "error". stamp: see `AnswerFile`.
    """
    folder = pathlib.Path(config.jsonl).parent
    rows = []
    asked = []
    for number, content in lines:
        row = {"line": number, "question": content}
        rows.append(row)
        try:
            with as_user_error("the question cannot be read: "):
                question = line_question(content, folder)
                require_trained(model.stages, model.config["pose_head"], [question])
                validate_length(model, question.typed)
        except UserError as error:
            row["error"] = str(error)
        else:
            asked.append((row, question))
    if not asked:
        return rows

    answers = answer_questions(model, [question for _, question in asked], config.decode)
    for (row, question), answer in zip(asked, answers):
        row["task"] = question.name
        if answer.pose is None:
            row["text"] = answer.text
        else:
            row["pose"] = matrix_to_aa(answer.pose).double().numpy().round(4).tolist()
        row["finished"] = answer.finished
        row |= stamp
    return rows


def answer_jsonl(model, config, lines, answers):
    """Answers lines of a file of questions, and writes each batch to the file of answers."""
    typed = []
    for _, content in lines:
        if isinstance(content, dict):
            typed += [content.get("text"), content.get("ask")]
    typed = " ".join(text for text in typed if isinstance(text, str))
    report_unknown_words(model, SLOT.sub(" ", typed))

    start_time = time.perf_counter()
    bad_rows = []
    for start in progress_bar(range(0, len(lines), config.batch), "questions"):
        batch = lines[start:start + config.batch]
        rows = answer_lines(model, batch, config, answers.stamp)
        answers.append(rows)
        bad_rows += [row for row in rows if "error" in row]

    seconds = time.perf_counter() - start_time
    print(f"{len(lines) - len(bad_rows)} of {len(lines)} questions answered in {seconds:.1f} s, "
          f"see {config.out}")
    if bad_rows:
        print(f"lines that could not be answered: {len(bad_rows)}, for example", file=sys.stderr)
    for row in bad_rows[:3]:
        print(f"    {config.jsonl}:{row['line']}: {row['error']}", file=sys.stderr)


# ---- 10. The command line ------------------------------------------------------------------------
@dataclass
class Config:
    """Ask UniPose; without a question, take the tour of its tasks.

    What is given decides the task, except for a picture alone: --task image2text or image2pose,
    and for a picture with a text:
      --task image_text2pose   the text describes the person in the picture
      --task reason            the text asks for the pose of one of several people
      --task reason_text       the text asks for a description of one of them
    Where nobody fits, the answer to the last two is a sentence that says so.

    In a conversation, --chat, a turn is a line. Later turns may refer to earlier ones:
      Estimate the pose of the person in the image <image photo.jpg>.
      Now raise the left hand a lot.
      What has changed?
      Describe the pose <pose walk.npz:120>.
    """

    text: list[str] = field(default_factory=list)  # a description, or with --pose an instruction
    image: list[str] = field(default_factory=list)  # a picture of a person; twice for two
    pose: list[str] = field(default_factory=list)  # a pose file, AMASS .npz or .npy; twice for two
    box: list[str] = field(default_factory=list)  # X,Y,W,H of the person in each --image, in pixels
    up: str = ""  # up in --pose: y | z | camera (y down, z ahead); empty: as the kind of file says
    task: str = ""  # where several take the same, see above
    ask: str = ""  # your own words, with <image>, <pose> or <caption> in the place of each input
    every: int = None  # describe every so many frames of a motion in --pose; of two: A's way to B
    chat: bool = False  # a conversation, typed or from standard input, a turn a line
    jsonl: str = ""  # a file of questions, one JSON object a line; needs --out ANSWERS.jsonl
    batch: int = 16  # how many questions of --jsonl, or frames of --every, are answered together
    weights: str = TINY  # a trained folder, or the official release's `cache`
    body: str = ""  # the body to draw: SMPL .pkl or .npz, SMPL-H, SMPL-X; empty: the free one
    decode: str = "argmax"  # argmax (paper) | soft: smoother | check: as the text says | ar: slow
    n: int = 1  # how many answers; several are sampled at --temperature
    temperature: float = 0.0  # of sampling; 0 is greedy, or 0.7 if --n is more than 1
    seed: int = 0  # of sampling
    out: str = "out"  # folder for poses and pictures; of --jsonl, the file of answers
    save: list[str] = field(default_factory=list)  # the pose: .npz .glb .bvh .obj [.openpose].json
    show: str = ""  # also write FILE.html, a page that shows people to turn with the mouse
    mesh: bool = False  # let --save and --show write the mesh of a licensed --body
    device: str = ""  # cpu | cuda; empty: the GPU if there is one
    threads: int = 0  # of the CPU; 0: one for a small model, all for one of the paper's size


def mode_of(config):
    """What the command line asks for: "chat", "jsonl", "every", "question" or "tour"."""
    if config.chat:
        return "chat"
    if config.jsonl:
        return "jsonl"
    if config.every is not None:
        return "every"
    is_question = config.text or config.image or config.pose or config.task or config.ask
    return "question" if is_question else "tour"


# mode -> where it is, which flags have no effect there, and what to do about it
NO_EFFECT = {
    "chat": ("with --chat", "leave it out: a turn says all, with <image PATH> and <pose PATH>", (
        "text", "image", "pose", "box", "task", "ask", "every", "jsonl", "batch", "n")),
    "jsonl": ("with --jsonl", "leave it out: each line of the file is a question of its own", (
        "text", "image", "pose", "box", "up", "task", "ask", "every", "n", "temperature", "seed",
        "body", "save", "show", "mesh")),
    "every": ("with --every", "leave it out: captions of the frames of --pose are printed", (
        "text", "image", "box", "ask", "n", "temperature", "seed", "out", "save")),
    "question": ("on one question", "leave it out, or ask many with --jsonl", ("batch",)),
    "tour": ("on the tour", "leave it out, or ask a question with --text, --image or --pose", (
        "n", "temperature", "seed", "box", "save", "batch")),
}


def validate_up(up):
    """Raises UserError unless `up` says which way is up."""
    if up not in ("", *UP_TURNS):
        raise UserError(f"--up {up} is not one of {', '.join(UP_TURNS)}")


def validate_flags(config):
    """Raises UserError if a flag has an impossible value, or one that would have no effect."""
    if config.decode not in DECODINGS:
        raise UserError(f"--decode {config.decode} is not one of {', '.join(DECODINGS)}")
    validate_up(config.up)
    if not 1 <= config.n <= 64:
        raise UserError(f"--n {config.n} must be from 1 to 64")
    if not 1 <= config.batch <= 1024:
        raise UserError(f"--batch {config.batch} must be from 1 to 1024")
    if not 0 <= config.threads <= 1024:
        raise UserError(f"--threads {config.threads} must be from 0 to 1024")
    validate_temperature(config.temperature)
    if config.n > 1 and config.decode in AVERAGED:
        raise UserError(f"--decode {config.decode} makes one answer of all, so --n must be 1; "
                        "sample several with --decode argmax")

    if config.every is not None and config.every < 1:
        raise UserError(f"--every {config.every} must be 1 or more; 30 describes every 30th frame")
    if config.every is not None and not config.pose:
        raise UserError(f"--every {config.every} is about a motion; give its file with --pose")
    if config.chat and sys.stdin is None:
        raise UserError("--chat reads standard input, which is closed; type turns, or pipe a file")
    where, advice, flags = NO_EFFECT[mode_of(config)]
    for name in flags:
        if getattr(config, name) != getattr(Config(), name):
            raise UserError(f"--{name} has no effect {where}; {advice}")
    if config.up and not (config.pose or config.chat):
        raise UserError(f"--up {config.up} is about pose files; give one with --pose, or leave it "
                        "out")
    if config.mesh and not (config.body and (config.save or config.show)):
        raise UserError("--mesh lets --save and --show write the mesh of a licensed --body; give "
                        "these, or leave it out")


def validate_outputs(config, questions, body):
    """Raises UserError if something that is to be written could not be.

    questions: [] for the tour and for a file of questions.
    """
    if config.jsonl:
        if not config.out.endswith(".jsonl"):
            raise UserError(f"--out {config.out} is no file for the answers of --jsonl; give a "
                            "name that ends in .jsonl: --out ANSWERS.jsonl")
        validate_writable("--out", config.out)
    elif config.every is None:
        validate_folder("--out", config.out)

    for path in config.save:
        validate_save(path, body, config.mesh)
        for question in questions:
            if question.want == "text":
                raise UserError(f"--save {path} is for a pose, and {question.name} answers with a "
                                "text, which is printed; leave it out")
    if config.show:
        n_answers = len(questions) * config.n or 2 * len(TASKS)     # with the tour's targets
        validate_page(config.show, n_answers, body, config.mesh)
    if config.mesh and not body.is_free:
        print(f"note: the mesh of the body {body.name} will be written; its licence may not let "
              "you pass it on", file=sys.stderr)


def answer_question(model, body, config, question):
    """Answers the question of the command line --n times; see `write_answers`."""
    check_typed(model, question)
    temperature = config.temperature
    if config.n > 1 and temperature == 0:
        temperature = 0.7           # greedy answers would all be the same
    generator = torch.Generator(model.device).manual_seed(config.seed)
    answers = answer_questions(model, [question], config.decode, temperature, generator, config.n)

    show_rows([write_answers(question, answers, body, config)], body, config)


def write_answers(question, answers, body, config, first=1):
    """Writes answers to a question -> the row of them in `write_page`.

    Texts are printed; poses and a picture of question and answers are written to --out, under
    names that are free, and poses also to the files that --save names: `first` is the number of the
    first of them.
    """
    out = pathlib.Path(config.out)
    number = next_number(out, question.name)
    missing = "" if question.want == "text" else "(no pose)"
    results = []
    for k, answer in enumerate(answers):
        results.append((f"answer {k + 1}" if config.n > 1 else "answer", answer.value))
        if answer.pose is None:
            print(answer.text or missing)
        else:
            path = out / f"{numbered(question.name, number + k)}.npz"
            write_pose(path, answer.pose)
            print(f"pose: {path}")
            report_unseen(question, answer, config)
        save_answer(answer, first + k, body, config)
        report_cut(answer)

    path = out / f"{numbered(question.name, number)}.png"
    row = (question.name, "", question.shown, results)
    save_png(contact_sheet([sheet_row(*row, body)]), path)
    print(f"picture: {path}", flush=True)
    return row


def report_unseen(question, answer, config):
    """Prints a note on what a typed text asks for and the pose of its answer does not show."""
    if question.name in TASKS and TASKS[question.name].group:
        return                                          # the text says whom it means
    pose = answer.pose
    if question.has_image:
        [pose] = face_front(pose[None])                 # it is in the camera's frame
    unseen = unseen_phrases(question.typed, pose)
    if unseen:
        advice = "try other words"
        if config.decode == "argmax" and config.n == 1:
            advice = "try --decode check, or other words"
        print(f"note: the pose does not show: {', '.join(unseen)}; {advice}", file=sys.stderr)


def report_cut(answer):
    """Prints a note if an answer is not complete."""
    if not answer.finished:
        print("note: the answer reached the length limit and was cut", file=sys.stderr)


def numbered_path(path, number):
    """The file for one of several answers: FILE.glb, FILE_2.glb and so on."""
    path = pathlib.Path(path)
    suffix = path.name[-len(suffix_of(path)):]
    return path.with_name(numbered(path.name.removesuffix(suffix), number) + suffix)


def save_answer(answer, number, body, config):
    """Writes the pose of an answer to the files that --save names; number: of the answer."""
    for path in config.save:
        if answer.pose is None:
            print(f"note: the answer is a text, so nothing is saved to {path}", file=sys.stderr)
            continue
        path = numbered_path(path, number)
        answer.save(path, body, config.mesh)
        print(f"pose: {path}")


def show_rows(rows, body, config):
    """Writes the page that --show names, if it does. rows: see `write_page`."""
    if config.show:
        write_page(config.show, rows, body, config.mesh)
        print(f"page: {config.show}")


def main(argv=None):
    """Answers one question, a motion, a file of questions or a conversation, or takes the tour."""
    config = cli(Config, argv)

    # whatever can be wrong with the inputs is found before the weights are read, which takes long
    validate_flags(config)
    mode = mode_of(config)
    device = find_device(config.device)
    body = load_body(config.body)
    questions = []
    if mode == "every":
        questions = read_motions(config)
    elif mode == "question":
        questions.append(read_question(
            config.text, config.image, config.pose, config.task, config.box, config.up, config.ask))
    validate_outputs(config, questions, body)

    notes = read_config(config.weights)
    with_images = mode == "tour"
    if mode == "jsonl":
        answers = AnswerFile(config.out, notes, config.decode)
        lines = answers.unanswered(read_lines(config.jsonl))
        with_images = any(asks_image(content) for _, content in lines)
        if not lines:
            print(f"{config.out} holds an answer to every question")
            return
    require_stages(notes.get("stages"), with_images, notes["pose_head"],
                   with_thought=mode == "chat")
    require_trained(notes.get("stages"), notes["pose_head"], questions)
    if config.pose:
        require_codes(notes["pose_head"])
    set_threads(config.threads, notes)

    model = load(config.weights, device)
    if config.decode == "ar" and model.config["attn"] != "causal":
        print("note: this model was not trained with --attn causal, so --decode ar measures its "
              "speed only, and its poses mean nothing", file=sys.stderr)

    if mode == "chat":
        chat(model, body, config)
    elif mode == "jsonl":
        answer_jsonl(model, config, lines, answers)
    elif mode == "every":
        answer_motion(model, body, config, questions)
    elif mode == "question":
        answer_question(model, body, config, questions[0])
    else:
        tour(model, body, config)


if __name__ == "__main__":
    run_main(main)
