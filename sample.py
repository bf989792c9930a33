"""Ask it something.

A text is read off token by token. A pose is made in ONE step: the moment a row says <p>, that mark, the N queries and
</p> go through the model together, and query i names code i:

    step 1   prompt …………………………………  -> "<p>"                         a text row would go on:  -> "the"
    step 2   <p> q q q q … q </p>       -> N codes at once, then "</s>"    step 2   the -> "left"   …

Rows of a batch may differ in task, in length and in what they make: prompts are padded on the left, and a row that has
nothing to say in some column leaves a hole there that nobody reads. Every row gets the answer that it gets alone.

Letters: B rows, q columns read in one step, N pose tokens, K codes, D LLM width.

    python sample.py                                              # the tour: seven tasks on test examples, one sheet
    python sample.py --text "The left knee is bent. Both hands are above the head."
    python sample.py --image photo.jpg --task image2pose --out out/
"""
import pathlib
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from captions import check_text, rest_joints
from data import (
    TASKS, World, body_colors, read_pose, render, render_template, templates, write_pose,
)
from tokenizer import (
    TINY, UserError, atomic_write, cli, face_front, first_line, forward_kinematics, load_asset,
    load_body, run_main,
)
from unipose import IGNORE_INDEX, collate, find_device, float_mask, load, mixed_mask


# ---- 1. Decoding -------------------------------------------------------------------------------------------------
@dataclass
class Answer:
    """What one row said: tidy text ("" if none), pose rotmat (22,3,3) or None, its codes (N,) and all ids in order."""
    text: str = ""
    pose: torch.Tensor | None = None
    codes: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    finished: bool = False  # the row ended by itself, not at the length limit
    max_tokens: int = 160  # that limit, in tokens

    @property
    def done(self):
        """Will it say no more?"""
        return self.finished or len(self.ids) >= self.max_tokens


class CachedModel:
    """Rows read so far: the KV cache, which of its columns hold a token of the row, and so each row's next place."""

    def __init__(self, model, n_rows):
        from transformers import DynamicCache
        self.model, self.cache = model, DynamicCache(config=model.llm.config)
        self.valid = torch.zeros(n_rows, 0, dtype=torch.bool, device=model.device)

    def read_ids(self, ids, block, code_index, valid, images=None):
        """Token ids, their blocks and slots, valid (B,q) each, image features (n,P,Dv) -> hidden states (B,q,D).
        Columns that are not valid leave holes."""
        x = self.model.embed(ids, code_index, images)                                            # (B,q,D)
        positions = (self.valid.sum(1, keepdim=True) + valid.cumsum(1) - 1).clamp(min=0)   # (B,q)
        past = float_mask(self.valid)[:, None, None].expand(-1, 1, x.size(1), -1)          # (B,1,q,past)
        mask = torch.cat([past, mixed_mask(block, valid)], -1)                             # (B,1,q,past+q)
        self.valid = torch.cat([self.valid, valid], 1)
        return self.model.hidden(x, mask, positions, self.cache)                           # (B,q,D)


def sample_token(logits, temperature=0.0, generator=None):
    """Logits (…,n) -> index (…): the greatest, or a draw at the given temperature."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(probs.view(-1, probs.size(-1)), 1, generator=generator).view(probs.shape[:-1])


def allowed_tokens(model, answer, want, stepwise):
    """Slices of the vocabulary in which this row's next token lies.

    Text may stop or open one pose; `want` = "pose" opens it at once (after the model's `lead`), "text" never. Inside a
    pose that is read off code by code only codes may come, and after N of them only </p>, whose place is known.
    """
    v = model.vocab
    texts, codes = slice(0, v.n_text), slice(v.pose0, v.p_open)
    p_open, p_close = slice(v.p_open, v.p_open + 1), slice(v.p_close, v.p_close + 1)
    if stepwise and v.p_open in answer.ids and v.p_close not in answer.ids:
        return [p_close] if len(answer.codes) == model.pose_tokenizer.n_tokens else [codes]
    if want == "pose" and len(answer.ids) < len(begin := [*model.answer_prefix, v.p_open]):
        return [slice(begin[len(answer.ids)], begin[len(answer.ids)] + 1)]
    return [texts] if want == "text" or v.p_open in answer.ids else [texts, p_open]


DECODINGS = ("argmax", "soft", "vote", "ar")
DRAWS, ENOUGH = 16, 4  # of "vote"; how many draws must say a sentence that stays in a text, chosen on the split val


def validate_decoding(model, *ways):
    """Refuses (UserError) a way of decoding that needs queries which a causal model does not have."""
    way = next((way for way in ways if way in ("soft", "vote")), "")
    if way and model.config["attn"] == "causal":
        raise UserError(f"--decode {way} needs the queries of a model trained with --attn mixed; this one is causal")


@torch.no_grad()
def generate(model, prompts, wants=None, decode="argmax", temperature=0.0, generator=None, max_new=0):
    """Answer a batch of prompts (segments without targets), each row as it would be answered alone.

    wants: per row "pose", "text" or None (the model decides). decode: "argmax" the best code per query (the paper),
    "soft" the codebook averaged under each query's distribution, "vote" the most usual of 16 draws, "ar" code by code.
    "vote" leaves out of a text the sentences that fewer than 4 of 16 draws say too; the others leave texts alone.
    A model trained with --attn causal has no queries and always answers code by code; "ar" on any other is a clock,
    since it never saw its own codes.
    temperature 0 is greedy. Returns a list of Answer; a row stops after max_new tokens at the latest (0: 160, and the
    release's 512 for a model of word pieces).
    """
    model.eval()
    max_new = max_new or (160 if model.is_word_level else 512)
    stepwise = decode == "ar" or model.config["attn"] == "causal"
    assert not (stepwise and decode in ("soft", "vote")), "both need all distributions at once"
    rows = collate([model.encode(prompt) for prompt in prompts], side="left")
    rows = {k: v if v is None else v.to(model.device) for k, v in rows.items()}
    wants = wants or [None] * len(prompts)
    answers, reader = [Answer(max_tokens=max_new) for _ in prompts], CachedModel(model, len(prompts))
    h = reader.read_ids(*(rows[key] for key in ("ids", "block", "code_index", "valid", "images")))[:, -1]  # (B,D)
    for _ in range(max_new):
        sample_step(model, answers, h, wants, stepwise, temperature, generator)
        if all(a.done for a in answers):
            break
        ids, block, code_index, valid = next_columns(model, answers, stepwise)                   # (B,q)
        hidden = reader.read_ids(ids, block, code_index, valid)                                  # (B,q,D)
        if ids.size(1) > 1:
            read_poses(model, answers, hidden, decode, temperature, generator)
        last = (valid.sum(1) - 1).clamp(min=0)
        h = hidden[torch.arange(len(answers), device=h.device), last]                      # (B,D)
    for answer, prompt in zip(answers, prompts):
        finish_answer(model, answer)
        if decode == "vote" and not answer.codes:
            answer.text = majority_sentences(answer.text, sample_texts(model, prompt, max_new))
    return answers


def sample_step(model, answers, h, wants, stepwise, temperature, generator):
    """Each unfinished row says one more token, written into its Answer. h (B,D): the last hidden state of each row."""
    logits, v = model.llm.lm_head(h), model.vocab                                          # (B,vocabulary)
    for answer, row, want in zip(answers, logits, wants):
        if answer.done:
            continue
        open_ = torch.full_like(row, -torch.inf)
        for part in allowed_tokens(model, answer, want, stepwise):
            open_[part] = row[part]
        token = int(sample_token(open_, temperature, generator))
        answer.finished = token == model.text_tokenizer.eos_token_id
        answer.ids.append(token)
        if v.pose0 <= token < v.p_open:
            answer.codes.append(token - v.pose0)


def next_columns(model, answers, stepwise):
    """ids, block, code_index, valid (B,q) of what is read next: one token a row, or <p>, N queries and </p> of a new pose.

    q is 1, or N+2 as soon as one row begins a pose; the other rows then fill one column and leave holes."""
    v, n = model.vocab, model.pose_tokenizer.n_tokens
    begins = [not stepwise and a.ids[-1] == v.p_open for a in answers]
    q = n + 2 if any(begins) else 1
    ids, block = torch.zeros(len(answers), q, dtype=torch.long), torch.full((len(answers), q), -1)
    code_index, valid = torch.full_like(block, -1), torch.zeros(len(answers), q, dtype=torch.bool)
    for i, answer in enumerate(answers):
        ids[i, 0], valid[i, 0] = answer.ids[-1], not answer.done
        if v.pose0 <= answer.ids[-1] < v.p_open:
            code_index[i, 0] = len(answer.codes) - 1
        if begins[i]:
            ids[i, 1:] = torch.tensor([*range(v.query0, v.query0 + n), v.p_close])
            block[i, 1:-1], valid[i] = 0, True
            answer.ids += [IGNORE_INDEX] * n + [v.p_close]  # the codes take these places in read_poses
    return (t.to(model.device) for t in (ids, block, code_index, valid))


def read_poses(model, answers, hidden, decode, temperature, generator):
    """The N codes of every row that has just opened a pose, from its query columns. hidden (B,N+2,D)."""
    v, n = model.vocab, model.pose_tokenizer.n_tokens
    for i, answer in enumerate(answers):
        if IGNORE_INDEX not in answer.ids:
            continue
        logits = hidden[i, 1:-1] @ model.llm.lm_head.weight[v.pose0:v.p_open].T            # (N,K)
        draw = medoid_pose(model, logits) if decode == "vote" else sample_token(logits, temperature, generator)
        answer.codes = draw.tolist()
        answer.ids[-n - 1:-1] = [v.pose0 + code for code in answer.codes]
        if decode == "soft":
            answer.pose = model.pose_tokenizer.decode_soft(logits.softmax(-1)[None])[0].cpu()   # (22,3,3)


def medoid_pose(model, logits):
    """Draws poses from the distributions of N queries (N,K) -> the codes (N,) of the one nearest to all others.

    Queries do not see each other's choice, so the best code of each need not make the best pose; a draw that many
    others resemble is at least one that holds together. The same draws for the same logits."""
    generator = torch.Generator(logits.device).manual_seed(0)
    codes = sample_token(logits.expand(DRAWS, -1, -1), 1.0, generator)                             # (16,N)
    joints = forward_kinematics(model.pose_tokenizer.decode(codes).cpu(), rest_joints())               # (16,22,3)
    apart = (joints[:, None] - joints).norm(dim=-1).mean(-1)                               # (16,16)
    return codes[apart.mean(1).argmin()]


def sample_texts(model, prompt, max_new):
    """What else could be said: DRAWS texts, the same for the same prompt, whoever else is in the batch."""
    same = torch.Generator(model.device).manual_seed(0)
    prompts = [model.prepare(prompt)] * DRAWS              # an image is looked at once
    draws = generate(model, prompts, ["text"] * DRAWS, temperature=1.0, generator=same, max_new=max_new)
    return [draw.text for draw in draws]


def majority_sentences(text, others):
    """A text without the sentences that fewer than ENOUGH of the others say; of sentences that nobody says enough, the
    most usual ones stay. A token's own chance tells less: it depends on what happened to be said before."""
    def sentences(text):
        return dict.fromkeys(sentence.strip() + "." for sentence in text.split(".") if sentence.strip())
    votes = Counter(sentence for other in others for sentence in sentences(other))
    enough = min(ENOUGH, max((votes[sentence] for sentence in sentences(text)), default=0))
    return " ".join(sentence for sentence in sentences(text) if votes[sentence] >= enough)


def finish_answer(model, answer):
    """Codes -> rotations, ids -> tidy text."""
    if len(answer.codes) == model.pose_tokenizer.n_tokens and answer.pose is None:
        codes = torch.tensor([answer.codes], device=model.device)
        answer.pose = model.pose_tokenizer.decode(codes)[0].cpu()                               # (22,3,3)
    words = [i for i in answer.ids if i < model.vocab.n_text and i != model.text_tokenizer.eos_token_id]
    answer.text = model.decode_text(words)


# ---- 2. Questions ------------------------------------------------------------------------------------------------
SMALLEST, LARGEST = 16, 8192  # sides of a picture that is worth looking at, in pixels


def read_image(path):
    """A picture file -> PIL RGB image, turned as its EXIF says, once, for both eyes. Raises UserError."""
    try:
        with Image.open(path) as picture:
            if min(picture.size) < SMALLEST or max(picture.size) > LARGEST:  # known before a pixel is decoded
                raise UserError(f"{path} is {picture.width}x{picture.height} pixels; a picture has sides of "
                              f"{SMALLEST} to {LARGEST} pixels, so crop or resize it")
            return to_rgb(ImageOps.exif_transpose(picture))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no image file {path}; check the path") from None
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise UserError(f"{path} is not a picture that Pillow can read, or one too large; give a PNG or JPEG") from None
    except Exception as error:  # a damaged file can fail anywhere inside a decoder
        raise UserError(f"{path} cannot be decoded as a picture ({first_line(error)}); save it again as PNG") from None


def to_rgb(picture):
    """Any PIL image -> RGB: 16-bit greys scaled to 8, transparent parts laid on white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, np.float64)
        return Image.fromarray((255 * values / max(values.max(), 1)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def infer_task(given, task=""):
    """The task that takes exactly these inputs ({kind: how many}); asks, by a UserError, where there are two or none."""
    def told(kinds):
        return " and ".join(f"{n} {kind}" + "s" * (n > 1) for kind, n in sorted(kinds.items())) or "nothing"
    if task and task not in TASKS:
        raise UserError(f"--task {task} is not one of {', '.join(TASKS)}")
    fitting = [name for name, row in TASKS.items() if Counter(row.inputs) == given]
    if task:
        if task not in fitting:
            raise UserError(f"--task {task} takes {told(Counter(TASKS[task].inputs))}, but {told(given)} was given")
        return task
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"{told(given)} can be read in two ways: add --task {' or --task '.join(fitting)}")
    takes = "; ".join(f"{name} {told(Counter(row.inputs))}" for name, row in TASKS.items())
    raise UserError(f"no task takes {told(given)}; there are: {takes}")


def question(task, inputs, model=None):
    """Inputs of a task in order -> the prompt, in the plain wording: ours, or that of the official weights."""
    official = model is not None and model.config["prompt_style"] == "released"      # they first learnt a task by one phrase
    return render_template(task, [*inputs, None], load_asset("instructions")["released"][task] if official else templates(task)[0])[:-1]


def read_inputs(config, model):
    """The command line -> (task, inputs in the task's order). Poses are turned to face front. Raises UserError."""
    given = {kind: getattr(config, kind) for kind in ("text", "image", "pose")}
    for kind, most in (("text", 1), ("image", 2), ("pose", 2)):
        if len(given[kind]) > most:
            raise UserError(f"--{kind} was given {len(given[kind])} times; a task takes at most {most}")
    if given["text"] and not given["text"][0].strip():
        raise UserError("--text is empty; describe a pose, for example --text 'The left knee is bent.'")
    task = infer_task(Counter({kind: len(values) for kind, values in given.items() if values}), config.task)
    validate_text(model, *given["text"])
    # texts speak of people who face front; where a pose file says otherwise, its heading goes
    readers = {"text": str, "image": read_image, "pose": lambda path: face_front(read_pose(path)[None])[0]}
    inputs = TASKS[task].inputs
    return task, [readers[kind](given[kind][inputs[:n].count(kind)]) for n, kind in enumerate(inputs)]


def validate_text(model, text=""):
    """Refuses (UserError) a text that does not fit the model; mentions on standard error words that it does not know."""
    try:
        n, room = len(model.text_ids(text)), model.llm.config.max_position_embeddings
    except (TypeError, UnicodeError):
        raise UserError("--text has bytes in it that are no characters; give UTF-8") from None
    if n + 2 * model.vision.n_patches + 4 * model.pose_tokenizer.n_tokens > room:
        raise UserError(f"--text has {n} words and marks; this model reads {room} tokens in all, so shorten it")
    words = [word.strip(".,?") for word in text.split()]
    strange = [word for word in dict.fromkeys(words) if word and model.text_tokenizer.unk_token_id in model.text_ids(word)]
    if strange:
        print(f"note: {len(strange)} words the model does not know, among them: {', '.join(strange[:8])}",
              file=sys.stderr)


# ---- 3. Pictures -------------------------------------------------------------------------------------------------
CELL, TURN = 256, -0.5  # pixels; poses of the text tasks are drawn half turned, so that depth shows


class Sheet:
    """A grid of cells, one row a question: name and figures on the left, then inputs, answer and truth."""

    def __init__(self, body):
        self.body, self.colors, self.rows = body, body_colors(body), []
        self.font, self.bold = ImageFont.load_default(14), ImageFont.load_default(18)

    def add(self, title, note, cells):
        """cells: list of (heading, value), value a text, a pose (22,3,3) or a picture."""
        turn = 0.0 if "image" in TASKS[title].inputs else TURN  # beside a photograph a pose is drawn from the camera's side
        self.rows.append((title, note, [(name, self.picture(value, turn)) for name, value in cells]))

    def picture(self, value, turn):
        """A text, a pose or a picture -> PIL image of one cell."""
        if isinstance(value, str):
            cell = Image.new("RGB", (CELL, CELL), "white")
            lines = textwrap.wrap(value or "(no text)", 34)
            shown = lines if len(lines) <= 15 else [*lines[:14], "…"]
            ImageDraw.Draw(cell).multiline_text((8, 8), "\n".join(shown), fill=(30, 30, 30), font=self.font, spacing=2)
            return cell
        if torch.is_tensor(value):
            with torch.no_grad():
                vertices = self.body(value[None])[1][0]
            value = render(vertices.numpy(), self.body.faces, self.colors, CELL, turn)
        return ImageOps.fit(Image.fromarray(value) if isinstance(value, np.ndarray) else value, (CELL, CELL))

    def save(self, path):
        """Write the grid as PNG. Raises UserError where the disk is full."""
        wide, high, left = max(len(cells) for _, _, cells in self.rows), CELL + 26, 170
        sheet = Image.new("RGB", (left + wide * (CELL + 6), high * len(self.rows)), (246, 246, 246))
        draw = ImageDraw.Draw(sheet)
        for y, (title, note, cells) in enumerate(self.rows):
            draw.text((10, y * high + 30), title, fill="black", font=self.bold)
            draw.multiline_text((10, y * high + 58), note, fill=(90, 90, 90), font=self.font)
            for x, (name, cell) in enumerate(cells):
                draw.text((left + x * (CELL + 6), y * high + 6), name, fill=(90, 90, 90), font=self.font)
                sheet.paste(cell, (left + x * (CELL + 6), y * high + 24))
        with atomic_write(path) as new:
            sheet.save(new, format="PNG")


# ---- 4. The tour -------------------------------------------------------------------------------------------------
def tour(model, body, config):
    """All seven tasks on test people: the k-th task asks about the k-th pair of the test split, whoever that is."""
    world, sheet, out = World("test", 2 * len(TASKS), model.vision.clip_size), Sheet(body), pathlib.Path(config.out)
    exams = {}
    for k, task in enumerate(TASKS):
        *inputs, truth = world.example(task, 2 * k, np.random.default_rng((0, 2 * k)))
        exams[task] = inputs, truth, [world.poses[person] for person in world.subjects(task, 2 * k)]
    begun = time.perf_counter()
    answers = generate(model, [question(task, inputs, model) for task, (inputs, _, _) in exams.items()],
                       [TASKS[task].target for task in exams], config.decode)
    spent = time.perf_counter() - begun
    for answer, (task, (inputs, truth, poses)) in zip(answers, exams.items()):
        note = score(task, answer, inputs, truth, poses, body)
        names = ["A", "B"] if len(inputs) == 2 and TASKS[task].target == "text" else ["given", "and told"]
        said = answer.text if TASKS[task].target == "text" else answer.pose
        sheet.add(task, note, [*zip(names, inputs), ("answer", said), ("truth", truth)])
        print(f"\n{task}   {note.replace(chr(10), ', ')}")
        for value in [*filter(lambda v: isinstance(v, str), inputs), answer.text]:
            print(textwrap.fill(value, 110, initial_indent="    ", subsequent_indent="    "))
        if answer.pose is not None:
            write_pose(out / f"{task}.npz", answer.pose)
    sheet.save(out / "tour.png")
    print(f"\nseven answers in {spent:.1f} s, read as one batch; look at {out / 'tour.png'}")


def score(task, answer, inputs, truth, poses, body):
    """How good one answer is, in a few words: joint error of a pose, true statements of a text."""
    if TASKS[task].target == "pose":
        if answer.pose is None:
            return "no pose"
        error = 1000 * (body.joints(answer.pose) - body.joints(truth)).norm(dim=-1).mean()
        return f"MPJPE {error:.0f} mm"
    held = check_text(answer.text, poses[-1], poses[0] if len(poses) == 2 else None)
    return f"{sum(near for near, _ in held)} of {len(held)}\nstatements true"


# ---- 5. The command line -----------------------------------------------------------------------------------------
@dataclass
class Config:
    """Ask UniPose; without a question, take the tour of all seven tasks."""
    text: list[str] = field(default_factory=list)  # a description, or with --pose an instruction
    image: list[str] = field(default_factory=list)  # a picture of a person; twice for two
    pose: list[str] = field(default_factory=list)  # a pose file, .npz (AMASS keys) or .npy; twice for two
    task: str = ""  # which task, where the inputs fit two: image2text or image2pose
    weights: str = TINY  # a trained folder, or the official release's `cache`
    body: str = ""  # a body to draw: SMPL .pkl or .npz, SMPL-H, SMPL-X; empty: the free one
    decode: str = "argmax"  # argmax (paper) | soft: a smoother pose | vote: what 16 draws agree on | ar
    n: int = 1  # how many answers; more than one are drawn at --temperature
    temperature: float = 0.0  # 0 is greedy; with --n above 1 and 0 here: 0.7
    seed: int = 0  # of the drawing
    out: str = "out"  # folder for poses and pictures
    device: str = ""  # cpu | cuda; empty: the GPU where there is one


def answer_question(model, body, config):
    """One question from the command line, --n answers: text to the terminal, poses and a picture to --out."""
    task, inputs = read_inputs(config, model)
    temperature = config.temperature or 0.7 * (config.n > 1)
    generator = torch.Generator(model.device).manual_seed(config.seed)
    prompts = [question(task, inputs, model)] * config.n
    answers = generate(model, prompts, [TASKS[task].target] * config.n, config.decode, temperature, generator)
    sheet, out = Sheet(body), pathlib.Path(config.out)
    cells = list(zip(("given", "and") if len(inputs) == 2 else ("given",), inputs))
    for k, answer in enumerate(answers):
        name = task if config.n == 1 else f"{task}_{k + 1}"
        if answer.pose is not None:
            write_pose(out / f"{name}.npz", answer.pose)
            print(f"{name}: wrote {out / (name + '.npz')}")
        else:
            print(answer.text)
        if not answer.finished:
            print("note: the answer was cut at its longest", file=sys.stderr)
        cells.append(("answer" if config.n == 1 else f"answer {k + 1}",
                      answer.text if answer.pose is None else answer.pose))
    sheet.add(task, "", cells)
    sheet.save(out / f"{task}.png")
    print(f"picture: {out / (task + '.png')}")


def main(argv=None):
    """Answers one question, or takes the tour."""
    config = cli(Config, argv)
    if config.decode not in DECODINGS:
        raise UserError(f"--decode {config.decode} is not one of {', '.join(DECODINGS)}")
    if not 1 <= config.n <= 64 or not 0 <= config.temperature <= 100:
        raise UserError(f"--n {config.n} must be 1 to 64, and --temperature {config.temperature} 0 to 100")
    if config.n > 1 and config.decode in ("soft", "vote"):
        raise UserError(f"--decode {config.decode} makes one answer of all, so --n must be 1; draw with --decode argmax")
    body, model = load_body(config.body), load(config.weights, find_device(config.device))
    validate_decoding(model, config.decode)
    if config.decode == "ar" and model.config["attn"] != "causal":
        print("note: this model was not trained with --attn causal and never saw its own codes; "
              "--decode ar is a clock here, not an answer", file=sys.stderr)
    asked = config.text or config.image or config.pose or config.task
    (answer_question if asked else tour)(model, body, config)


if __name__ == "__main__":
    run_main(main)
