"""The specification of this program, as sentences, in the order of its files.

    python -m pytest -q                 # everything, a few minutes on two cores, no network, no download
    python -m pytest -q -k golden       # the numbers of the public code; skipped where the golden folder is absent
"""
import ast
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import types

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two threads on a busy machine are slower than one

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import data
import eval as evaluation
import sample
import tokenizer
import train
import unipose

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE / os.environ.get("UNIPOSE_GOLDEN", "../shared/golden")
FLIP = torch.tensor([-1.0, 1, 1])  # what a mirror does to x, y, z


# ---- What several sections use ---------------------------------------------------------------------------------------
def golden(name):
    """One file of the golden folder: its arrays, or its path where it is not ours to open. Skips where it is absent."""
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"no golden data at {path}: set UNIPOSE_GOLDEN")
    if "/cache/" in name or path.suffix == ".json":
        return path if "/cache/" in name else json.loads(path.read_text())
    return load_file(path) if path.suffix == ".safetensors" else np.load(path)


def poses(n, seed=0):
    """n random poses (n,22,3,3)."""
    return tokenizer.aa_to_matrix(0.5 * torch.randn(n, 22, 3, generator=torch.Generator().manual_seed(seed)))


def close(one, other, atol=1e-5, rtol=0.0):
    """Fails with a picture of the difference."""
    torch.testing.assert_close(one, other, atol=atol, rtol=rtol)


def learn(loss_of, parameters, steps, lr):
    """Adam for some steps; what loss_of() said last."""
    optimiser = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        loss, logs = loss_of()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach()), logs


def run_script(*command, limit=0):
    """A script of ours in a new process; limit: bytes that any file may grow to."""
    confine = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    return subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True,
                          preexec_fn=confine)


def refusals(call, names):
    """Each name makes `call` raise a Mistake of one line that names it: {name: what was said}."""
    said = {}
    for name in names:
        with pytest.raises(tokenizer.Mistake) as mistake:
            call(name)
        said[name] = str(mistake.value)
        assert name.split(":")[0] in said[name] and "\n" not in said[name], said[name]
    return said


@pytest.fixture(scope="session")
def body():
    """The embedded body."""
    return tokenizer.load_body()


@pytest.fixture(scope="session")
def world():
    """10,000 training people; their codes are made once."""
    return data.World("train", 10_000)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A nano model through all six stages by the README's own command: folder, CPU seconds, what was printed."""
    out, before = tmp_path_factory.mktemp("weights") / "nano", resource.getrusage(resource.RUSAGE_CHILDREN)
    run = run_script("train.py", "--stage", "all", "--size", "nano", "--out", out)
    assert run.returncode == 0, run.stderr[-2000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return out, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, run.stdout


# ---- tokenizer.py ----------------------------------------------------------------------------------------------------
def test_golden_official_rotations():
    """Axis-angle, quaternion, matrix and 6D agree with the official helpers, also at 0 and at pi."""
    r = golden("official/rotations/rotations.safetensors")
    matrix, from_d6 = r["matrix_from_axis_angle"], tokenizer.sixd_to_matrix(r["d6"])
    close(tokenizer.aa_to_matrix(r["axis_angle"]), matrix)
    close(tokenizer.aa_to_matrix(tokenizer.matrix_to_aa(matrix)), matrix)
    close(tokenizer.matrix_to_sixd(matrix), r["sixd_from_matrix"])
    close(from_d6, r["matrix_from_d6"])
    assert ((tokenizer.matrix_to_quaternion(matrix) * r["quaternion_from_matrix"]).sum(-1).abs() > 1 - 1e-5).all()
    for ours, theirs in ((matrix, r["axis_angle_from_matrix"]), (from_d6, r["axis_angle_from_d6"])):
        # near pi both signs are right, and here and there the official formula loses digits (1e-4 becomes 0)
        sound = (tokenizer.aa_to_matrix(theirs) - ours).abs().amax((1, 2)) < 1e-5
        sound &= (theirs.norm(dim=-1) - np.pi).abs() > 1e-2
        assert sound.float().mean() > 0.8
        close(tokenizer.matrix_to_aa(ours)[sound], theirs[sound])


def test_rotations_are_safe_at_zero_and_at_pi():
    """Gradients stay finite there, and axis-angles come back within 1e-7 from 1e-6 to a hair below pi."""
    aa = torch.tensor([[0, 0, 0], [np.pi, 0, 0], [0, 1e-8, 0], [0, 0, -np.pi], [1e-4, 0, 0]], requires_grad=True)
    there = tokenizer.aa_to_matrix(aa)
    back = tokenizer.matrix_to_aa(tokenizer.sixd_to_matrix(tokenizer.matrix_to_sixd(there)))
    (there.sum() + back.sum()).backward()
    assert aa.grad.isfinite().all()
    close(tokenizer.aa_to_matrix(back), there, atol=1e-6)
    axis = F.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).double(), dim=-1)
    for angle in (1e-6, 1e-3, 1.0, 3.0, np.pi - 1e-6):
        close(tokenizer.matrix_to_aa(tokenizer.aa_to_matrix(angle * axis)), angle * axis, atol=1e-7)


def test_the_bodys_joints_and_skin_equal_smplx(body):
    """Forward kinematics and our skinning give smplx's numbers; a mirrored pose has mirrored joints."""
    rotmat, chosen = poses(4), tokenizer.some_vertices(body)
    joints, vertices = body(rotmat)
    assert vertices.shape == (4, len(body.template), 3) and joints[:, 0].abs().max() < 1e-6
    close(body.joints(rotmat), joints, atol=2e-6)
    close(body.skin(rotmat, chosen)[1], vertices[:, chosen], atol=2e-6)
    even = (body.rest + (body.rest * FLIP)[tokenizer.MIRROR]) / 2  # a skeleton that is its own mirror image
    expected = (tokenizer.forward_kinematics(rotmat, even) * FLIP)[:, tokenizer.MIRROR]
    close(tokenizer.forward_kinematics(tokenizer.mirror(rotmat), even), expected)


def fake_smpl(count, seed=0, vertices=40):
    """Arrays with the keys and shapes of an SMPL (24 joints), SMPL-H (52) or SMPL-X (55) file."""
    rng = np.random.default_rng(seed)
    hands = {24: [20, 21], 52: [20, 22, 23] * 5 + [21, 37, 38] * 5, 55: [15] * 3 + [20, 25, 26] * 5 + [21, 40, 41] * 5}
    parents = np.array([2 ** 32 - 1] + tokenizer.PARENTS[1:] + hands[count], np.uint32)
    return {"v_template": rng.normal(size=(vertices, 3)), "f": rng.integers(0, vertices, (30, 3)).astype(np.uint32),
            "shapedirs": rng.normal(size=(vertices, 3, 10)), "weights": rng.dirichlet(np.ones(count), vertices),
            "posedirs": 0.01 * rng.normal(size=(vertices, 3, 9 * (count - 1))),
            "J_regressor": rng.multinomial(9, np.ones(vertices) / vertices, count) / 9,
            "kintree_table": np.stack([parents, np.arange(count, dtype=np.uint32)])}


def pose_by_hand(arrays, rotmat):
    """Linear blend skinning in plain numpy with every joint of the file; the extra ones do not turn."""
    parents, template = arrays["kintree_table"][0].astype(np.int64), arrays["v_template"]
    rest = arrays["J_regressor"] @ template
    local = np.concatenate([rotmat, np.broadcast_to(np.eye(3), (len(parents) - 22, 3, 3))])
    turns, places = [local[0]], [rest[0]]
    for j in range(1, len(parents)):
        turns.append(turns[parents[j]] @ local[j])
        places.append(places[parents[j]] + turns[parents[j]] @ (rest[j] - rest[parents[j]]))
    shape = template + arrays["posedirs"] @ (local[1:] - np.eye(3)).ravel()
    parts = [(shape - rest[j]) @ turns[j].T + places[j] for j in range(len(parents))]
    made = sum(arrays["weights"][:, j, None] * part for j, part in enumerate(parts))
    return np.array(places)[:22] - places[0], made - places[0]


class Ch(types.SimpleNamespace):
    """Pickles like the foreign objects inside a licensed file: a class from elsewhere, and its state."""


csc_matrix = type("csc_matrix", (Ch,), {"__module__": __name__})


def official_pickle(arrays):
    """The bytes of an official SMPL .pkl: chumpy blend shapes, a sparse joint regressor, Python 2 protocol."""
    columns = arrays["J_regressor"].T
    rows = [np.flatnonzero(column) for column in columns]
    sparse = csc_matrix(_shape=columns.T.shape, indices=np.concatenate(rows), data=columns[columns > 0],
                        indptr=np.cumsum([0, *map(len, rows)]))
    code = pickle.dumps(arrays | {"J_regressor": sparse, "shapedirs": Ch(x=arrays["shapedirs"])}, protocol=2)
    for name, home in ((b"Ch", b"chumpy.ch"), (b"csc_matrix", b"scipy.sparse.csc")):
        code = code.replace(b"c%s\n%s\n" % (__name__.encode(), name), b"c%s\n%s\n" % (home, name))
    return code


@pytest.mark.parametrize("count, suffix", [(24, "pkl"), (24, "npz"), (52, "npz"), (55, "npz")])
def test_smpl_smplh_and_smplx_files_are_posed_by_one_path(tmp_path, count, suffix):
    """Folding fingers and face changes no vertex; foreign classes and object arrays in a file are never opened."""
    arrays, path, rotmat = fake_smpl(count), tmp_path / f"model.{suffix}", poses(2)
    path.write_bytes(official_pickle(arrays))
    if suffix == "npz":
        np.savez(path, joint2num=np.array({"pelvis": 0}, dtype=object), **arrays)
    model = tokenizer.load_body(path)
    for i, (joints, vertices) in enumerate(zip(*model(rotmat))):
        expected = pose_by_hand(arrays, rotmat[i].double().numpy())
        np.testing.assert_allclose(joints, expected[0], atol=1e-5)
        np.testing.assert_allclose(vertices, expected[1], atol=1e-5)
    close(model.skin(rotmat, torch.arange(40))[1], model(rotmat)[1])      # ours knows pose correctives too


class Evil:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_damaged_body_files_are_refused_in_one_sentence(tmp_path):
    """Missing file or key, wrong shapes, another skeleton, NaN, a web page; a pickle with code in it is not run."""
    good = fake_smpl(24)
    bad = {"key": {k: v for k, v in good.items() if k != "posedirs"}, "shape": good | {"weights": good["weights"][1:]},
           "nan": good | {"v_template": good["v_template"] * np.nan}, "text": good | {"f": np.array("faces")},
           "face": good | {"f": good["f"] + 40}, "tree": good | {"kintree_table": good["kintree_table"][:, ::-1]}}
    for name, arrays in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "page.pkl").write_text("<!DOCTYPE html><html>please log in</html>")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "nan.npz").read_bytes()[:3000])
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(good | {"f": Evil(tmp_path / "ran")}, protocol=2))
    refusals(lambda name: tokenizer.load_body(tmp_path / name),
             [*(f"{name}.npz" for name in bad), "page.pkl", "cut.npz", "code.pkl", "absent.npz"])
    assert not (tmp_path / "ran").exists()


def test_every_kind_of_pose_file_is_read_alike(tmp_path):
    """What write_pose writes, matrices and axis-angles in .npy, both AMASS layouts, numbered frames, bfloat16."""
    rotmat = poses(1)[0]
    aa = tokenizer.matrix_to_aa(rotmat).numpy()
    amass = np.concatenate([tokenizer.matrix_to_aa(tokenizer.UP.T @ rotmat[:1]).numpy(), aa[1:]]).reshape(1, 66)
    files = {"m.npy": rotmat.numpy(), "a.npy": aa, "b.npy": aa.ravel(), "c.npy": np.pad(aa.ravel(), (0, 6)),
             "coarse.npy": rotmat.bfloat16().float().numpy()}
    for name, array in files.items():
        np.save(tmp_path / name, array)
    np.savez(tmp_path / "h.npz", poses=np.pad(amass, ((2, 0), (0, 90))), gender=np.array("male", dtype=object))
    np.savez(tmp_path / "x.npz", root_orient=amass[:, :3], pose_body=amass[:, 3:])
    tokenizer.write_pose(tmp_path / "new" / "w.npz", rotmat)
    for name in [*files, "h.npz:2", "x.npz", "x.npz:0", "new/w.npz"]:
        read = tokenizer.read_pose(tmp_path / name)
        close(read, rotmat, atol=1e-2 if name == "coarse.npy" else 1e-5)
        close(read @ read.mT, torch.eye(3).expand_as(read))
    tokenizer.write_pose(tmp_path / "stand.npz", torch.eye(3).expand(22, 3, 3))
    written = np.load(tmp_path / "stand.npz")["poses"]
    np.testing.assert_allclose(written, np.pad([[np.pi / 2]], ((0, 0), (0, 155))), atol=1e-6)  # z up: turned about x


def test_bad_pose_files_are_refused_in_one_sentence(tmp_path):
    """Each kind of wrong file names itself, its fault and fits one line; pickles are never opened."""
    good, zero = poses(1)[0].numpy(), np.zeros((7, 156))
    for name, array in {"shape": good[:21], "nan": good * np.nan, "scaled": good * 1.1, "flip": -good,
                        "words": np.array(["left"]), "objects": np.array([None, good], object),
                        "zeros": good * 0, "huge": np.full(66, 1e300)}.items():
        np.save(tmp_path / f"{name}.npy", array)
    for name, arrays in {"long": {"poses": zero}, "empty": {"poses": zero[:0]}, "other": {"trans": zero},
                         "odd": {"root_orient": zero[:1, :3], "pose_body": zero[:2, :63]}}.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    damaged = {"cut.npy": (tmp_path / "scaled.npy").read_bytes()[:400], "text.npy": b"hello", "void.npy": b"",
               "cut.npz": (tmp_path / "long.npz").read_bytes()[:400], "pickle.npy": pickle.dumps(good, protocol=2),
               "bytes.pkl": pickle.dumps([1, 2, 3], protocol=2)}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    says = {"long.npz": "7 frames", "long.npz:7": "no frame 7", "empty.npz": "holds 0", "nan.npy": "NaN",
            "huge.npy": "huge", "flip.npy": "not orthonormal", "scaled.npy": "matrix 0 (pelvis)",
            "shape.npy": "(21, 3, 3)", "nowhere.npy": "no file"}
    said = refusals(lambda name: tokenizer.read_pose(tmp_path / name),
                    [*says, *damaged, "zeros.npy", "words.npy", "objects.npy", "other.npz", "odd.npz"])
    assert all(part in said[name] for name, part in says.items()), said


TINY = tokenizer.TokenizerConfig(hidden=16, code_dim=8, codes=32, upsample_step=0)


def golden_tokenizer():
    """The golden weights in a PoseTokenizer whose sizes are read from the files -> (model, missing, unexpected)."""
    state, tokens = golden("official/vqvae/state.safetensors"), golden("official/vqvae/io.safetensors")["ids2"].shape[1]
    hidden, (codes, code_dim) = len(state["encoder.encoder.0.bias"]), state["quantizer.codebook"].shape
    config = tokenizer.TokenizerConfig(hidden, code_dim, codes, upsample_step=round(math.log2(tokens / 20)))
    model = tokenizer.PoseTokenizer(config).eval()
    return model, *model.load_state_dict(state, strict=False)


def test_golden_official_weights_encode_and_decode():
    """Official weights load by name (their file forgets some state); 6D, latents, ids and rotations agree."""
    model, missing, unexpected = golden_tokenizer()
    assert not unexpected
    assert sorted(missing) == ["quantizer.code_count", "quantizer.code_sum", "quantizer.initialised"]
    gold = golden("official/vqvae/io.safetensors")
    close(tokenizer.matrix_to_sixd(gold["rotmat"]), gold["pose6d"], 1e-4, 1e-4)
    close(model.encoder(gold["pose6d"]).detach(), gold["latents"], 1e-4, 1e-4)
    sure, made = gold["code_margin"] > 1e-3, model.decode(gold["code_idx"])
    assert torch.equal(model.encode(gold["rotmat"])[sure], gold["code_idx"][sure])
    close(made, gold["decoded_rotmat"], 1e-4, 1e-4)
    close(model.decode(gold["ids2"]), gold["ids2_decoded_rotmat"], 1e-4, 1e-4)
    close(tokenizer.matrix_to_aa(made).flatten(1), gold["decoded_axis_angle"], 1e-3, 1e-3)


def test_golden_official_codebook_updates():
    """Training steps of the moving averages give the official codebook, sums, counts, outputs and perplexity."""
    ema = golden("official/vqvae/ema.safetensors")
    codes, code_dim = ema["step0_codebook"].shape
    quantizer = tokenizer.Quantizer(tokenizer.TokenizerConfig(code_dim=code_dim, codes=codes)).train()
    for step in range(sum(name.endswith("_in") for name in ema)):
        want = {name.split("_", 1)[1]: value for name, value in ema.items() if name.startswith(f"step{step}_")}
        out, _, info = quantizer(want["in"], rows=torch.arange(codes))
        assert torch.equal(quantizer.nearest(want["in"]), want["idx"])
        for ours, name in ((out, "out"), (info["commit"][None], "commit"), (info["perplexity"][None], "perplexity"),
                           *((getattr(quantizer, name), name) for name in ("codebook", "code_sum", "code_count"))):
            close(ours, want[name], 1e-5, 1e-5)
    out, _, info = quantizer.eval()(want["in"])
    close(out, ema["eval_out"], 1e-5, 1e-5)
    close(info["perplexity"], ema["eval_perplexity"][0], 1e-5, 1e-5)


def test_golden_official_train_step():
    """Each weighted loss term, the vertex weights and some gradients equal the official training code's."""
    model, step = golden_tokenizer()[0], golden("official/vqvae/train_step.safetensors")
    theirs = tokenizer.load_body(golden("official/cache/smpl_models/smplh/SMPLH_NEUTRAL.npz"))
    close(theirs.area, step["vertex_weights"][:, 0], rtol=1e-4)
    loss, terms = tokenizer.tokenizer_loss(model, step["body_pose_rotmat"], theirs)
    for ours, name in {"pose": "recons_pose_loss", "joints": "recons_joints_loss", "vertices": "recons_vertices_loss",
                       "commit": "vq_commit_loss"}.items():
        close(terms[ours], step[f"loss.{name}"][0], 0, 1e-4)
    close(loss.detach(), step["loss.total_loss"][0], 0, 1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        if f"grad.{name}" in step:
            # theirs went through axis-angles close to half turns, where their formula loses digits
            assert (parameter.grad - step[f"grad.{name}"]).norm() < 0.01 * parameter.grad.norm()


@pytest.mark.parametrize("steps, tokens", [(2, 80), (1, 40), (0, 20)])
def test_poses_become_n_tokens_and_tokens_become_rotations(steps, tokens):
    """upsample_step 2, 1, 0 give N = 80, 40, 20; with all probability on one code, soft decoding is hard decoding."""
    model = tokenizer.PoseTokenizer(dataclasses.replace(TINY, upsample_step=steps)).eval()
    ids = model.encode(poses(3))
    made = model.decode(ids)
    assert ids.shape == (3, tokens)
    close(made @ made.mT, torch.eye(3).expand_as(made))
    close(model.decode_soft(F.one_hot(ids, TINY.codes).float()), made, atol=1e-6)


def test_dead_codes_are_refilled_from_the_batch_and_living_ones_are_not():
    """A code whose running count fell below 1 becomes one of this batch's latents, drawn by the given generator."""
    generator = torch.Generator().manual_seed(0)
    quantizer = tokenizer.Quantizer(TINY).train()
    latents = torch.randn(4, TINY.code_dim, 20, generator=generator)
    quantizer(latents, generator)
    quantizer.code_count[:] = 100.0
    quantizer.code_sum[:] = 100 * quantizer.codebook
    quantizer.code_count[5] = 0.1
    quantizer.codebook[5] = 1000.0  # so far away that nobody chooses it
    before = quantizer.codebook.clone()
    quantizer(latents, generator)
    flat = latents.mT.flatten(0, 1)  # (80,C)
    assert (flat == quantizer.codebook[5]).all(1).any()
    assert (quantizer.codebook - before).norm(dim=1)[torch.arange(TINY.codes) != 5].max() < 0.5


def test_the_gradient_goes_straight_through_the_quantizer():
    """The output is the code, the gradient arrives at the latent unchanged, and none reaches the codebook."""
    quantizer, generator = tokenizer.Quantizer(TINY), torch.Generator().manual_seed(0)
    quantizer.codebook.normal_(generator=generator)
    latents, weight = torch.randn(2, 2, 8, 20, generator=generator).requires_grad_().unbind()
    latents.retain_grad()
    out, ids, _ = quantizer.eval()(latents)
    close(out.detach(), quantizer.codebook[ids].mT)
    (out * weight).sum().backward()
    assert torch.equal(latents.grad, weight) and not quantizer.codebook.requires_grad


def test_root_noise_turns_whole_people_and_part_noise_parts_of_the_input():
    """Root noise turns input and target alike; part noise moves whole parts of half the inputs, and no target."""
    rotmat = torch.eye(3).repeat(200, 22, 1, 1)
    seen, target = tokenizer.noisy(rotmat, torch.Generator().manual_seed(0), root=True)
    turn = tokenizer.matrix_to_aa(seen[:, 0]).norm(dim=-1).max().rad2deg()
    assert torch.equal(seen, target) and torch.equal(seen[:, 1:], rotmat[:, 1:]) and 45 < turn < 60
    seen, target = tokenizer.noisy(rotmat, torch.Generator().manual_seed(0), root=False, parts=True)
    hit = (seen - rotmat).abs().amax((2, 3)) > 1e-6
    parts = {tuple(row.nonzero().flatten().tolist()) for row in hit[hit.any(1)]}
    assert parts == {tuple(sorted(part)) for part in tokenizer.PARTS}
    assert hit.any(1).sum() == 100 and torch.equal(target, rotmat)


# ---- data.py: seven tasks and their templates ------------------------------------------------------------------------
@pytest.mark.parametrize("task", data.TASKS)
def test_200_distinct_templates_hold_exactly_the_slots_of_their_task_in_order(task):
    """At most 14 words, only the marks . , ? and one target, of the task's kind, at the end; slots in texts stay."""
    lines, (inputs, target) = data.templates(task), data.TASKS[task]
    values = [f"lift <pose> and <caption> {k}" for k in range(len(inputs) + 1)]
    assert len(lines) == len(set(lines)) == 200
    for line in lines:
        assert data.SLOT.findall(line) == data.slots(task) and len(line.split()) <= 14, line
        assert re.fullmatch(r"[A-Za-z .,?]+", data.SLOT.sub("", line)), line
        *given, answer = data.fill(task, values, line)
        assert answer == (target, values[-1], True) and not any(said for _, _, said in given)
        assert [(kind, value) for kind, value, _ in given if value in values] == [*zip(inputs, values)]


# ---- data.py: posecodes, paircodes, captions -------------------------------------------------------------------------
def golden_y_up():
    """The golden poses, turned from AMASS's z up to the body frame (n,22,3,3)."""
    rotmat = tokenizer.aa_to_matrix(torch.tensor(golden("captions/poses.npz")["pose_aa_raw"]))
    rotmat[:, 0] = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=rotmat.dtype) @ rotmat[:, 0]
    return rotmat


def golden_codes():
    """Posecodes of the golden poses, from their own coordinates."""
    gold = golden("captions/poses.npz")
    return data.posecodes_at(gold["coords"], tokenizer.aa_to_matrix(torch.tensor(gold["pose_aa_yup"])))


def golden_pairs():
    """Paircodes of the golden pairs -> (pairs, golden file, codes of A, codes of B)."""
    gold, codes, rotmat = golden("captions/paircodes.npz"), golden_codes(), golden_y_up()
    a, b = gold["pairs"].T
    together = torch.tensor(gold["rotation_change/in_sequence"])[:, None, None, None]
    front = torch.where(together, data.face_front(rotmat[b], like=rotmat[a]), data.face_front(rotmat[b]))
    turn = data.vertical_turn(data.face_front(rotmat[a]), front)
    np.testing.assert_allclose(turn, gold["rotation_change/deg_xyz"][:, 1], atol=0.05)
    one, two = (dataclasses.replace(codes, **{name: getattr(codes, name)[rows] for name in
                ("value", "category", "low", "high", "eligibility", "at", "rotmat")}) for rows in (a, b))
    return data.paircodes_at(one, two, turn), gold, one, two


def golden_columns(table, gold, kind):
    """Columns of our table in the order of a golden kind."""
    index = {(row["kind"], row["joints"].replace(" ", "|")): s for s, row in enumerate(table.columns)}
    return [index[kind, joints] for joints in gold[f"{kind}/jointsets"]]


def golden_supers(table, gold, prefix=""):
    """Columns of our table in the order of a golden list of super-codes."""
    mine = {}
    for p, row in enumerate(table.supers, len(table.columns)):
        parts = ["_".join(filter(None, part)) for part in (row["code"][:2], row["code"][3:]) if part[1]]
        mine["|".join(parts), row["code"][2]] = p
    return [mine[parts.removesuffix("|torso"), data.PAIR * (prefix != "") + category]
            for parts, category in zip(gold[prefix + "bodyparts"], gold[prefix + "intptt"])]


def same_as_golden(codes, table, gold):
    """Values, categories and eligibility of all kinds of a golden file; entries on a threshold do not count."""
    for kind in gold["kinds"]:
        at, tolerance = golden_columns(table, gold, kind), 0.05 if gold[f"{kind}/noise"] > 1 else 1e-4
        np.testing.assert_allclose(codes.value[:, at], gold[f"{kind}/value"], atol=tolerance, err_msg=kind)
        clear = (np.abs(gold[f"{kind}/value"][..., None] - gold[f"{kind}/thresholds"]) > tolerance).all(-1)
        for mine, theirs in ((codes.category, "intptt"), (codes.eligibility, "eligibility")):
            assert (mine[:, at] == gold[f"{kind}/{theirs}"])[clear].all(), (kind, theirs)


def test_golden_captions_places_and_heading_come_from_the_raw_poses():
    """AMASS poses, turned to the body frame and to heading 0, give the official 35 coordinates."""
    gold = golden("captions/poses.npz")
    assert list(gold["joint_names"]) == data.PLACES
    close(data.face_front(golden_y_up()), tokenizer.aa_to_matrix(torch.tensor(gold["pose_aa_yup"])))
    np.testing.assert_allclose(data.places(gold["coords22"]), gold["coords"], atol=1e-6)


def test_golden_posecodes_all_kinds_and_supers_match_the_official_extraction():
    """Every value, category and eligibility of the elementary kinds, eligibility of all super-posecodes."""
    codes, table, supers = golden_codes(), data.pose_table(), golden("captions/superposecodes.npz")
    same_as_golden(codes, table, golden("captions/posecodes.npz"))
    assert (codes.eligibility[:, golden_supers(table, supers)] == supers["eligibility"]).all()


def test_golden_paircodes_all_kinds_and_supers_and_the_rotation_match():
    """Every value, category and eligibility of the pair kinds, the super-paircodes and the turn of the body."""
    pairs, gold, _, _ = golden_pairs()
    table = data.pair_table()
    same_as_golden(pairs, table, gold)
    assert (pairs.eligibility[:, golden_supers(table, gold, "super/")] == gold["super/eligibility"]).all()
    last = len(gold["rotation_change/categories"]) - 1   # both ends of the scale are called "around"
    assert (pairs.category[:, len(table.columns) - 1] % last == gold["rotation_change/intptt"] % last).all()


def test_golden_paircodes_demands_on_pose_b_match():
    """Posecodes that may be asked of a pose; the official code silences a helper of one pair in all pairs."""
    pairs, gold, one, two = golden_pairs()
    table, demand = data.pose_table(), pairs.b.eligibility.copy()
    full = np.zeros((len(golden_codes().value), demand.shape[1]), np.int8)
    full[gold["pairs"][:, 1]] = demand
    for codes, first, end in ((two, 0, 1), (one, len(table.columns), 0)):
        rows, columns = data.helpers(pairs, codes, len(data.pair_table().columns) + first)
        full[gold["pairs"][rows, end], columns] = 0
    kinds, supers = golden("captions/posecodes.npz"), golden("captions/superposecodes.npz")
    columns = {kind: golden_columns(table, kinds, kind) for kind in kinds["kinds"]}
    for kind, at in {**columns, "superPosecodes": golden_supers(table, supers)}.items():
        assert (full[:, at] == gold[f"posecode_eligibility_in_pairs/{kind}"]).all(), kind


def golden_list(cell):
    """The codes of one row of a golden list, written as ours are."""
    return {tuple(word or "" for word in code) for code in json.loads(str(cell))}


def clear(codes, table):
    """Rows (M,) of which no value is so near to a threshold that rounding decides."""
    tolerance = np.where(table.noise > 1, 0.05, 1e-4)[:, None]
    return (np.abs(codes.value[..., None] - table.thresholds) > tolerance).all((1, 2))


def test_golden_captions_code_lists_before_and_after_the_redundancy_rules():
    """What may be said of a pose; what the transitive rule, the 27 rules (and their mirror images), and both leave."""
    codes, table, gold = golden_codes(), data.pose_table(), golden("captions/code_lists.npz")
    assert sum(len(targets) for _, targets in data.implications("redundant")) == 2 * 27
    for i in np.flatnonzero(clear(codes, table)):
        every = set(data.eligible(table, codes, i))
        outer = data.between(every)
        follow = set().union(*(targets for need, targets in data.implications("redundant") if need <= every))
        for name, mine in (("formatted", every), ("after_transrel", every - outer), ("after_stat", every - follow),
                           ("after_both", every - outer - follow)):
            assert mine == golden_list(gold[name][i]), (name, i)


def test_golden_paircodes_lists_keep_what_is_asked_of_changed_parts():
    """All paircodes of a pair, and of the demands on B those on a part that changes, or further down its limb."""
    pairs, gold, _, two = golden_pairs()
    for k in np.flatnonzero(clear(pairs, data.pair_table()) & clear(two, data.pose_table())):
        moves = {code for code in data.eligible(data.pair_table(), pairs, k) if code[1] != "person"}
        changed = {part for code in moves for part in data.parts_named(code)}
        demands = golden_list(gold["lists/posecodes_abs"][gold["pairs"][k, 1]])
        assert moves == golden_list(gold["lists/paircodes"][k]), k
        ends = {code for code in demands if data.touched(code, changed)}
        assert moves | ends == golden_list(gold["lists/joined"][k]), k


def test_reading_a_text_gives_back_exactly_what_was_said(world):
    """statements() inverts both grammars on 10,000 texts each: at most 15 statements, 90 words and marks, few words."""
    known = data.caption_words()
    assert len(known) < 600
    for i in range(len(world.poses)):
        rng, pairs = np.random.default_rng((1, i)), world.pairs[i % 2]
        may = data.eligible(data.pose_table(), world.codes, i)
        for demand, said in enumerate((data.select(may, rng), data.choose_difference(pairs, i // 2, rng))):
            text = data.say(said, rng, demand=bool(demand))
            assert sorted(data.statements(text)) == sorted(said) and (demand or said)
            assert text and len(said) <= 15 and len(text.replace(".", " .").split()) <= 90
            assert set(text.lower().replace(".", "").split()) <= known
            assert data.statements(text.upper().replace(".", " .")) == data.statements(text)


def test_a_text_holds_for_its_own_pose_and_not_for_another(world):
    """check(): all true where the text was made, many false elsewhere; a sentence outside the grammar never holds."""
    rng, foreign, at = np.random.default_rng(0), [], world.poses
    for i in range(0, 100, 2):
        text, change = world.caption(i, rng), world.difference(i, i + 1, rng)
        assert all(map(all, data.check(text, at[i]))) and all(map(all, data.check(change, at[i + 1], at[i])))
        assert data.check(text, at[i]) == data.verdicts(text, world.codes, i)
        foreign += data.check(text, at[i + 100]) + data.check(change, at[i], at[i + 1])
    assert np.mean(foreign, 0).max() < 0.6 and all(within or not exact for within, exact in foreign)
    assert data.check("The left ear is purple. Raise the left hand slightly.", at[0]) == [(False, False)] * 2
    same = data.difference(data.paircodes(at[:1], at[:1]), 0, rng)
    assert same and data.statements(same) == data.check(same, at[0], at[0]) == data.check("", at[0]) == []


def test_the_tolerance_moves_a_value_over_a_threshold_and_no_further():
    """A knee at 163 degrees may be called slightly bent within 5 degrees; at 0, rounding of the cosine makes no NaN."""
    at = data.posecodes(torch.eye(3).repeat(1, 22, 1, 1)).at.repeat(50, 0)
    hip, knee, ankle = (data.PLACES.index(f"left_{part}") for part in ("hip", "knee", "ankle"))
    up, front = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 3, 2)))[0].transpose(2, 0, 1)
    for angle, category, verdict in ((163, "straight", (True, True)), (163, "slightly bent", (True, False)),
                                     (163, "bent less", (False, False)), (0, "completely bent", (True, True))):
        at[:, hip] = at[:, knee] + 0.4 * up
        at[:, ankle] = at[:, knee] + 0.3 * (np.cos(np.radians(angle)) * up + np.sin(np.radians(angle)) * front)
        codes = data.posecodes_at(at, np.eye(3, dtype=np.float32)[None, None].repeat(50, 0).repeat(22, 1))
        assert np.isfinite(codes.value).all()
        assert {data.holds(("left", "knee", category, "", ""), codes, i) for i in range(50)} == {verdict}, category


def test_full_captions_are_true_read_back_exactly_and_leave_out_only_what_follows(world):
    """Poses and pairs, by chance or not, of the embedded world and of random joints: no sentence is said twice."""
    wild = tokenizer.aa_to_matrix(torch.randn(200, 22, 3, generator=torch.Generator().manual_seed(0)))
    wild = data.posecodes(wild, False), data.paircodes(wild[0::2], wild[1::2], False, "body")
    for codes, i, chance in itertools.product((world.codes, *world.pairs, *wild), range(100), (True, False)):
        text, units = (tell(codes, i, np.random.default_rng(i) if chance else None)
                       for tell in (data.describe, data.units_of))
        said, lines = sorted(itertools.chain(*units.values())), data.sentences(text)
        assert sorted(data.statements(text)) == said and all(map(all, data.verdicts(text, codes, i)))
        assert len(set(lines)) == len(lines) and re.fullmatch(r"([A-Z][a-z]+( [a-z]+,?)*\. ?)+", text), text
        assert not re.search(r"(^|\. )(The (left|right) \w+ (are|touch)|(Both|The) (hands|feet|knees) is) ", text), text
        if not codes.b and not chance:
            may = set(data.eligible(data.pose_table(), codes, i))
            rules = data.implications("redundant") + data.implications("contradicted")
            assert may - set(said) <= data.between(may).union(*(targets for _, targets in rules))


def test_clauses_share_a_sentence_with_the_right_verb():
    """Of one template the subjects are listed; of one subject name and "is" are said once."""
    hand, foot, near, bent = "the left hand", "the left foot", "{a} [is|are] near the head", "{a} [is|are] bent"
    assert data.compose([(hand, near), (foot, near)]) == "the left hand and foot are near the head"
    assert data.compose([("both feet", near), (hand, near)]) == "both feet and the left hand are near the head"
    assert data.compose([(hand, near), (hand, bent)]) == "the left hand is near the head and bent"
    assert data.compose([("both feet", "raise {a}"), ("both feet", "bend {a}")]) == "raise both feet and bend them"


def test_a_caption_is_a_function_of_its_pose_seed_and_number(world):
    """Chunks do not matter, a stream is read only as far as it is asked for, and without chance seeds do not matter."""
    poses = world.poses[:40]
    one, two = (list(data.captions(poses, seed)) for seed in (1, 2))
    endless = data.captions(itertools.cycle(poses), seed=1, chunk=7)
    assert one == [next(endless) for _ in poses] and one != two
    assert len({(*data.captions(poses, seed, True, chunk=3 + seed),) for seed in (1, 2)}) == 1


def test_in_its_own_frame_a_body_is_described_alike_however_it_lies(world):
    """frame="body": turned any way, only what has to do with the floor changes, and that is the room's."""
    stands, lies = world.poses[:100], world.poses[:100].clone()
    lies[:, 0] = tokenizer.aa_to_matrix(torch.tensor([[1.4, 0.3, -0.4]])) @ lies[:, 0]
    floor = np.array([row["kind"] in data.FLOOR for row in data.pose_table().columns])
    one, two, room = (data.posecodes(*args).value for args in (
        (stands, True, "body"), (lies, True, "body"), (lies, True)))
    np.testing.assert_allclose(one[:, ~floor], two[:, ~floor], atol=0.1)
    assert (two[:, floor] == room[:, floor]).all() and np.abs(room - one)[:, ~floor].max() > 1


# ---- data.py: synthetic people ---------------------------------------------------------------------------------------
def test_person_i_is_a_pure_function_of_split_and_index():
    """Neither how many are asked for nor what was photographed before matters; splits share nobody."""
    short, long = data.World("test", 20, size=64), data.World("test", 600, size=64)
    assert torch.equal(short.seen, long.seen[:20]) and short.activity == long.activity[:20]
    long.image(3)
    assert np.array_equal(short.image(5), long.image(5)) and short.image(5).shape == (64, 64, 3)
    one, two, three = (data.populate(split, 600)[1].flatten(1) for split in data.SPLITS)
    assert min(torch.cdist(*pair).min() for pair in ((one, two), (one, three), (two, three))) > 0.02
    for split, n in (("training", 10), ("train", 3), ("train", 0), ("train", 1 << 21)):
        with pytest.raises(tokenizer.Mistake, match="people"):
            data.populate(split, n)


def test_nobody_leaves_the_limits_of_the_joints(world):
    """Knees and elbows are hinges within the table's limits, on both sides; wrists, feet, collars are nearly still."""
    limits = json.loads((HERE / "assets" / "activities.json").read_text())["limits"]
    for side in (world.poses, tokenizer.mirror(world.poses)):
        for joint, axis, (low, high) in (("knee", 0, limits["leg"]["knee"]), ("elbow", 1, limits["arm"]["bend"])):
            turn = tokenizer.matrix_to_aa(side[:, tokenizer.JOINTS.index(f"left_{joint}")].double()).rad2deg()
            bend = turn[:, axis] * (1 - 2 * axis)                            # an elbow bends about -y
            assert bend.min() > low - 0.1 and bend.max() < high + 0.1, (joint, bend.min(), bend.max())
            assert turn[:, [k for k in range(3) if k != axis]].abs().max() < 0.1
    still = tokenizer.matrix_to_aa(world.poses[:, tokenizer.STILL]).norm(dim=-1).rad2deg()
    assert still.max() < 3 * math.sqrt(3) + 0.1


def test_people_do_what_their_activity_says(world, body):
    """At least 24 activities, equally often, left and right alike; who stands is on the feet, who lies is flat."""
    names, counts = np.unique(world.activity, return_counts=True)
    assert len(names) == len(data.people().activities) >= 24 and counts.min() > 10_000 / len(names) / 3
    joints, first, feet = body.joints(world.poses), np.array(world.activity[0::2]), [10, 11]
    height = {name: joints[0::2][torch.tensor(first == name)][..., 1] for name in names}                      # (M,22)
    for name in ("T-pose", "hands on hips", "saluting", "jumping jack"):
        assert (height[name][:, 15] > 0.4).all()
        assert (height[name][:, feet].min(1).values < height[name].min(1).values + 0.05).all()
    for name in ("lying on the back", "lying on the front", "lying on the side"):
        assert (height[name][:, [0, 9, 12, 15, 16, 17]].std(1) < 0.12).all()
    assert (height["sitting cross-legged"][:, feet] > -0.3).all() and (height["handstanding"][:, 15] < -0.4).all()
    assert (joints.mean(0) - joints.mean(0)[tokenizer.MIRROR] * FLIP).norm(dim=-1).max() < 0.03


def test_an_edit_changes_one_to_three_parts_and_150_to_300_mm_on_average(world, body):
    """Trunk, one leg and two arms are the parts; what is not edited stays exactly as it was."""
    a, b = world.poses[0::2], world.poses[1::2]
    assert 0.15 < (body.joints(a) - body.joints(b)).norm(dim=-1).mean() < 0.3
    parts = [[3, 6, 9], [4], [5], [16, 18], [17, 19]]      # knees stand for legs: a bow moves the hips as well
    moved = torch.stack([(a[:, part] - b[:, part]).abs().amax((1, 2, 3)) > 1e-4 for part in parts], 1)
    assert moved.sum(1).min() >= 1 and moved.sum(1).max() <= 3 and not (moved[:, 1] & moved[:, 2]).any()


def test_photographs_show_people_turned_by_their_heading(world):
    """Only the root differs; seven in ten face the camera. image2pose, in training and exams, wants the turned pose."""
    assert torch.equal(world.seen[:, 1:], world.poses[:, 1:])
    turn = (world.seen[:, 0] @ world.poses[:, 0].mT).numpy()
    assert np.allclose(np.arctan2(turn[:, 0, 2], turn[:, 0, 0]), world.headings, atol=1e-5)
    assert 0.67 < np.mean(np.abs(world.headings) < math.pi / 4) < 0.73 and np.abs(world.headings).max() > 3
    for task, wanted in (("image2pose", world.seen), ("text2pose", world.poses)):
        exam, answer = evaluation.Exam(world, task, 8), data.Mixture([task], 1, world)[0][1][-1][1]
        assert (wanted == answer).flatten(1).all(1).any() and torch.equal(exam.poses, wanted[0:16:2])
        close(exam.facing(exam.poses), world.poses[0:16:2])                  # captions speak of people who face +z


def test_a_picture_says_which_side_of_an_upright_person_it_shows(world):
    """Quarter turns of the heading, nothing of who lies or bows; the sentence is no statement and can be read back."""
    upright = np.array([view != "" for view in world.views])
    names = np.array([*data.VIEWS])[np.round(world.headings / (math.pi / 2)).astype(int) % 4]
    assert (np.array(world.views)[upright] == names[upright]).all() and 0.6 < upright.mean() < 0.9
    lying = np.array([name.startswith("lying") for name in world.activity])
    assert not upright[lying & (np.arange(10_000) % 2 == 0)].any()
    for i in range(8):
        plain, seen = world.caption(i, np.random.default_rng(i)), world.sight(i, np.random.default_rng(i))
        assert data.statements(seen) == data.statements(plain) and data.side_shown(seen) == world.views[i]
        assert data.side_shown(plain) == "" and world.scene(i).startswith(world.activity[i].lower())
    marks = evaluation.view_truth(["Seen from the left. A.", "Seen from the back. A.", "A."], ["left", "left", ""])
    assert marks == {"view_accuracy": 0.5, "view_balanced": 0.5} and evaluation.view_truth(["A."], [""]) == {}


def test_requests_are_captions_whole_or_short_or_the_activitys_name(world):
    """What is asked for is true of the person; an edited person is not called by the activity it came from."""
    asked = [world.request(i, np.random.default_rng(i)) for i in range(400)]
    whole = [len(data.statements(text)) > 8 for text in asked]
    named = [text.lower().startswith(world.activity[i].lower() + ".") for i, text in enumerate(asked)]
    assert 0.6 < np.mean(whole) < 0.85 and 0.05 < np.mean(named) < 0.2 and not any(named[1::2])
    assert all(data.verdicts(text, world.codes, i) for i, text in enumerate(asked) if not named[i])
    known = set(data.words())
    assert all(set(re.findall(r"[^\s.,?]+", text.lower())) <= known for text in asked)


def test_example_k_of_a_mixture_depends_on_seed_and_k_alone():
    """Resuming needs no loader state. Tasks, directions of pairs and instructions are mixed evenly, all words known."""
    world, ids, known = data.World("train", 60), range(60), data.words()
    one, again, other = (data.Mixture(data.TASKS, seed, world, ids, ids, ids) for seed in (0, 0, 1))
    drawn = [one[k] for k in range(1400)]
    assert drawn == [again[k] for k in reversed(range(1400))][::-1] and drawn[:9] != [other[k] for k in range(9)]
    assert all(150 < sum(name == task for name, _ in drawn) < 250 for task in data.TASKS)
    pairs = [[value for kind, value, _ in segments if kind == "pose"] for task, segments in drawn if task == "posediff"]
    assert all(a ^ b == 1 for a, b in pairs) and 0.35 < np.mean([a < b for a, b in pairs]) < 0.65
    plain = data.Mixture(["pose2text"], 0, world, ids, templates=1)
    assert {plain[k][1][0][1] for k in range(50)} == {data.templates("pose2text")[0].split("<")[0]}
    said = " ".join(value for _, segments in drawn for kind, value, _ in segments if kind == "text").lower()
    assert set(re.findall(r"[^\s.,?]+|[.,?]", said)) <= set(known) and known == sorted(set(known)) and len(known) < 1200


# ---- data.py: readers, builders, real data in training --------------------------------------------------------------
def bytes_of(write):
    """What write(file) writes."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def npz(**arrays):
    """The bytes of a .npz."""
    return bytes_of(lambda file: np.savez(file, **arrays))


def jpeg():
    """The bytes of a picture of 100 x 60 pixels."""
    return bytes_of(lambda file: Image.fromarray(PICTURES[0]).resize((100, 60)).save(file, format="JPEG"))


def tar(members):
    """{name: bytes} -> the bytes of a tar."""
    def write(file):
        with tarfile.open(fileobj=file, mode="w") as made:
            for name, content in sorted(members.items()):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
    return bytes_of(write)


def person(rotmat, **changes):
    """One of the people in 4D-Humans' tars: single numpy numbers, a dict in an array, the root in a camera's axes."""
    aa = tokenizer.matrix_to_aa(torch.cat([torch.diag(-FLIP) @ rotmat[:1], rotmat[1:]])).flatten()
    fit = np.array({"reprojection_loss": np.float32(7)}, dtype=object)
    return {"body_pose": F.pad(aa, (0, 6)).numpy(), "has_body_pose": np.float32(1), "center": np.array([50.0, 30.0]),
            "scale": np.array([0.1, 0.2]), "keypoints_2d": np.ones((44, 3)), "extra_info": {"fitting_loss": fit},
            **changes}


def in_amass(seen):
    """Poses (T,22,3,3) as AMASS's SMPL+H keeps them: z up, with fingers (T,156)."""
    aa = tokenizer.matrix_to_aa(torch.cat([tokenizer.UP.T @ seen[:, :1], seen[:, 1:]], 1)).double().flatten(1)
    return F.pad(aa, (0, 90)).numpy()


def in_evaluation(seen, **changes):
    """An evaluation .npz; its scale is in pixels."""
    return npz(**{"imgname": np.array(["ü.jpg", "b.jpg"]), "scale": np.full(2, 40.0), "center": np.full((2, 2), 50.0),
                  "body_pose": np.stack([person(pose)["body_pose"] for pose in seen[:2]])} | changes)


A_FILE, INDEX, TAR = "AMASS/BioMotionLab_NTroje/s 1/a_poses.npz", "ids_2_dataset_sequence_and_frame_index", "h36m/0.tar"
RELEASES = {"amass": "amass:{}/AMASS/BioMotionLab_NTroje", "smplx": "amass:{}/X", "v1": "posescript_a:{}/v1,{}/AMASS",
            "v1 human": "posescript_h:{}/v1,{}/AMASS", "v2": "posescript_a:{}/v2,{}/AMASS",
            "v2 human": "posescript_h:{}/v2,{}/AMASS", "fix": "posefix_h:{}/fix,{}/AMASS", "tars": "tars:{}/h36m",
            "evaluation": "evaluation:{}/3dpw.npz,{}/Bilder", "images": "images:{}/Bilder", "built": "built:{}/built"}


def releases(seen):
    """{file: bytes, or what becomes JSON} in exactly the formats of all data sets, of poses (40,22,3,3)."""
    aa, frames = in_amass(seen), {str(k): ["AMASS", "BMLrub/s 1/a_poses.npz", 3 * k] for k in range(4)}
    rows = [{"id": "a", "source": "x", "image": "b.jpg", "texts": ["a"], "pose": [0.1] * 66} for _ in range(2)]
    return {
        A_FILE: npz(poses=aa, gender=np.array(b"male"), mocap_framerate=24.0), "AMASS/CMU/1/b_poses.npz": npz(poses=aa),
        "X/CMU/1/b_stageii.npz": npz(root_orient=aa[:, :3], pose_body=aa[:, 3:66], mocap_frame_rate=120,
                                     latent_labels=np.array(["a", None], dtype=object)),
        "AMASS/BioMotionLab_NTroje/s 1/shape.npz": npz(betas=np.zeros(16)),
        f"v1/{INDEX}.json": frames, "v1/train_ids.json": [0, 1], "v1/val_ids.json": [2],
        "v1/automatic_A.json": {str(k): f"A {k}" for k in range(3)}, "v1/automatic_B.json": {"0": ["B 0"]},
        "v1/human6293.json": {"1": ["by hand"]},
        f"v2/{INDEX}_100k.json": frames, "v2/train_ids_100k.json": [0, 1], "v2/test_ids_100k.json": [2, 3],
        "v2/posescript_auto_100k.json": {str(k): ["eins", "zwei", "drei"] for k in range(4)},
        "v2/posescript_human_6293.json": {"3": "ein Mensch"},
        f"fix/{INDEX}_100k.json": frames | {"3": ["AMASS", "CMU/1/b_poses.npz", 9]},
        "fix/pair_id_2_pose_ids.json": [[0, 1], [3, 2]], "fix/train_in_sequence_pair_ids.json": [0],
        "fix/train_out_sequence_pair_ids.json": [1], "fix/posefix_paraphrases_4284.json": {"0": ["Lift it."]},
        "fix/posefix_human_6157.json": {"0": "Raise it.", "1": ["Lower it."]},
        TAR: tar({f"train/{k}.{end}": content for k in range(2) for end, content in (
            ("jpg", jpeg()), ("data.pyd", pickle.dumps([person(seen[k])], protocol=2 + 3 * k)))}),
        "3dpw.npz": in_evaluation(seen), "Bilder/ü.jpg": jpeg(), "Bilder/b.jpg": jpeg(),
        "Bilder/boxes.json": {"ü.jpg": [10, 5, 30, 50]}, "built/b.jpg": jpeg(),
        "built/imagescript.jsonl": "\n".join(map(json.dumps, rows)).encode()}


def lay_out(folder, contents):
    """Writes {file: bytes, or what becomes JSON; None: no such file} -> {name: data set in this folder}."""
    for name, content in contents.items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return {name: spec.replace("{}", str(folder)) for name, spec in RELEASES.items()}


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Poses of people who look all ways (40,22,3,3), and {name: the data set that holds them}."""
    seen = data.World("train", 40).seen
    return seen, lay_out(tmp_path_factory.mktemp("real") / "groß und klein", releases(seen))


def test_every_release_is_read_into_the_same_records_in_our_frame(real):
    """Poses of all formats come back as they were written, whatever their axes; so do texts, splits, pairs, boxes."""
    (seen, specs), rows = real, {
        "amass": range(8, 32, 2), "smplx": range(8, 32, 10), "v1": [0, 3, 6], "v1 human": [3], "v2": [0, 3, 6, 9],
        "v2 human": [9], "fix": [3, 6], "tars": [0, 1], "evaluation": [0, 1]}
    found = {name: data.read([spec]) for name, spec in specs.items()}
    for name, at in rows.items():
        close(torch.tensor(np.stack([record["pose"] for record in found[name]])), seen[list(at)])
    assert {record["source"] for record in found["amass"]} == {"amass-BMLrub"}
    assert [r["texts"] for r in found["v1"]] == [["A 0", "B 0"], ["A 1"], ["A 2"]]
    assert [r["split"] for r in found["v1"] + found["v2"]] == ["train"] * 2 + ["val"] + ["train"] * 2 + ["test"] * 2
    one, two = found["fix"]
    assert one["texts"] == ["Raise it.", "Lift it."] and one["together"] and not two["together"]
    close(torch.tensor(np.stack([one["start"], two["start"]])), seen[[0, 9]])
    assert [r["box"] for r in found["tars"]] == [[50, 30, 40]] * 2 and "box" not in found["images"][0]
    assert found["images"][1]["box"] == [25, 30, 50] and found["evaluation"][0]["box"] == [50, 50, 40 * 4 / 3]
    assert data.cut(found["tars"][1], 48).size == (48, 48)


@pytest.mark.skipif("AMASS_SAMPLE" not in os.environ, reason="set AMASS_SAMPLE to a public AMASS file")
def test_a_public_amass_file_holds_upright_people():
    """Rotations, and in most frames a pelvis that is nearly upright in our frame."""
    found = torch.tensor(np.stack([record["pose"] for record in data.read([f"amass:{os.environ['AMASS_SAMPLE']}"])]))
    close(found @ found.mT, torch.eye(3).expand_as(found))
    assert (found[:, 0, 1, 1] > 0.7).float().mean() > 0.5


def damages(seen, trap):
    """(data set, damaged file, its content, how many entries are left or a word of the Mistake), one by one."""
    def people(members=(), **changes):
        pickles = {f"{k}.data.pyd": pickle.dumps([person(seen[k], **(changes if k else {}))]) for k in range(2)}
        return tar({"0.jpg": jpeg(), "1.jpg": jpeg()} | pickles | dict(members))

    good, aa, html, none = releases(seen), in_amass(seen), b"<!DOCTYPE html><html>log in</html>", "holds nothing"
    ids, row = f"v2/{INDEX}_100k.json", good["built/imagescript.jsonl"].splitlines()[0]
    for content in (good[A_FILE][:9000], html, b"", npz(trans=aa), npz(poses=aa[:, :60]), npz(poses=aa[:0]),
                    npz(poses=aa.astype(object)), npz(poses=np.array("poses")), npz(poses=aa * np.nan)):
        yield from (("amass", A_FILE, content, none), ("v2", A_FILE, content, none))
    yield "amass", A_FILE, npz(poses=np.where(np.arange(40)[:, None] == 10, np.nan, aa), mocap_framerate=24.0), 11
    yield "amass", A_FILE, npz(poses=aa, mocap_framerate=np.nan), none
    for file, frame in (("a", 999), ("a", -1), ("none", 0), ("a", "one"), ("a", None)):
        yield "v2", ids, good[ids] | {"3": ["AMASS", f"BMLrub/s 1/{file}_poses.npz", frame]}, 3
    for file in (ids, "v2/posescript_auto_100k.json", "v2/train_ids_100k.json"):
        yield "v2", file, b'{"0": ["eins"', file.split("/")[1]
    yield from (("v2", ids, None, "JSON"), ("v2", ids, good[ids] | {"3": ["AMASS"]}, 3),
                ("v2", "v2/posescript_auto_100k.json", [1], "cannot be read"),
                ("v2", "v2/posescript_auto_100k.json", None, none))
    for pairs, left in (([[0, 1]], 1), ([[0, 1], [0, 7]], 1), ([[0, 1], 5], "cannot be read")):
        yield "fix", "fix/pair_id_2_pose_ids.json", pairs, left
    for content in (people([("1.jpg", b"no picture")]), people([("1.jpg", jpeg()[:700])]), people(center="x"),
                    people([("1.data.pyd", b"no pickle")]), people([("1.data.pyd", pickle.dumps(Evil(trap)))]),
                    people([("1.data.pyd", pickle.dumps({"a": 1}))]), people(body_pose=None), people(has_body_pose=0),
                    people(body_pose=np.full(72, np.nan)), people(body_pose=np.zeros(60)), people(scale=np.zeros(2)),
                    people(keypoints_2d=np.zeros((44, 3))), people()[:people().rindex(b"1.data.pyd") + 900],
                    people(extra_info={"fitting_loss": np.array({"reprojection_loss": 1e6}, object)})):
        yield "tars", TAR, content, 1
    for changes, left in (({"scale": np.zeros(3)}, "cannot be read"), ({"body_pose": np.full((2, 72), np.nan)}, none),
                          ({"imgname": np.array(["ü.jpg", "c.jpg"])}, 1), ({"center": np.zeros((1, 2))}, 1),
                          ({"imgname": np.array(["ü.jpg", None])}, "cannot be read"), ({"scale": np.zeros(2)}, none)):
        yield "evaluation", "3dpw.npz", in_evaluation(seen, **changes), left
    yield from (("tars", TAR, html, none), ("evaluation", "3dpw.npz", html, "cannot read"),
                ("evaluation", "3dpw.npz", npz(a=aa), "it has no"), ("evaluation", "Bilder/b.jpg", jpeg()[:700], 1),
                ("images", "Bilder/b.jpg", html, 1), ("images", "Bilder/boxes.json", b"{", "JSON"),
                ("images", "Bilder/boxes.json", {"ü.jpg": [1, 2]}, 1), ("built", "built/b.jpg", html, none),
                ("images", "Bilder/boxes.json", {"ü.jpg": [0, 0, -5, -5]}, 1))
    for line in (row[:-9], row.replace(b"0.1, ", b"", 1), row.replace(b"0.1, ", b"1e9, "), row.replace(b"b.j", b"c.j")):
        yield "built", "built/imagescript.jsonl", row + b"\n" + line, 1


def test_damaged_data_is_left_out_and_counted_or_refused_in_a_sentence(real, tmp_path, capsys):
    """Cut off, misshapen, NaN, web pages, ids past the end: an entry is lost, or a sentence says what is wrong."""
    trap, tried = tmp_path / "ran", 0
    for tried, (name, file, content, left) in enumerate(damages(real[0], trap), 1):
        spec = lay_out(tmp_path / f"{tried} ü", releases(real[0]) | {file: content})[name]
        if isinstance(left, str):
            with pytest.raises(tokenizer.Mistake, match=re.escape(left)) as mistake:
                data.read([spec])
            assert "\n" not in str(mistake.value)
        else:
            assert len(data.read([spec])) == left and ": 1 entries are left out" in capsys.readouterr().err, file
    (tmp_path / "empty").mkdir()
    for spec in (*RELEASES.values(), "posefix_a:{}", "world:{}", "world:train", "world:train:3", "dance:{}", "{}", ""):
        for path in ("empty", "nowhere"):
            with pytest.raises(tokenizer.Mistake):
                data.read([spec.replace("{}", str(tmp_path / path))])
    assert tried > 60 and not trap.exists()


def test_a_data_set_can_be_looked_at_before_it_is_trained_on(real, tmp_path, capsys):
    """--check counts entries, words, boxes and angles, and draws pictures and poses, where there are any."""
    data.main(["--check", real[1]["images"], "--out", str(tmp_path)])
    data.main(["--check", real[1]["tars"], "--check", real[1]["fix"], "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"h36m +2 entries\nposefix +train +2 entries\nwords in a text +3 +2 to 2", said), said
    assert "pixels, side of a box" in said and np.asarray(Image.open(tmp_path / "check.png")).std() > 20


def test_golden_mining_farthest_points_and_differing_codes():
    """The order from pose 0 and the numbers of differing codes are the public code's, but for values on a threshold."""
    gold, codes = golden("captions/mining.npz"), golden_codes()
    for points, order in ((golden("captions/poses.npz")["coords22"], "fps_order_heading_normalised"),
                          (gold["coords22_root0"], "fps_order_root0")):
        assert data.farthest(points, len(points)) == gold[order].tolist()
    off = np.stack([data.differing(row, codes.category) for row in codes.category]) - gold["n_different_posecodes"]
    assert np.abs(off).max() <= 1 and (off == 0).mean() > 0.9


def test_farthest_points_are_those_of_plain_search(body):
    """Leaving out what cannot change leaves the order as it is; doubles come last, and nobody comes twice."""
    level = torch.cat([torch.eye(3).expand(600, 1, 3, 3), data.World("train", 600).poses[:, 1:]], 1)
    points = body.joints(torch.cat([level, level[:50]])).numpy()
    near, order = np.full(len(points), np.inf), [7]
    for _ in range(559):
        near = np.minimum(near, np.linalg.norm(points - points[order[-1]], axis=-1).mean(-1))
        order.append(int(near.argmax()))
    made = data.farthest(points, len(points), 7)
    assert made[:560] == order and sorted(made) == list(range(650))


def build(out, *flags):
    """data.py --build in this process -> its rows as the reader gives them, and as they stand in the file."""
    data.main(["--out", str(out), "--poses", "world:train:400", *map(str, flags)])
    rows = next(out.glob("*.jsonl")).read_text().splitlines()
    return data.read([f"built:{out}"]), [json.loads(row) for row in rows]


def test_imagescript_is_built_by_quotas_and_read_back(tmp_path, real):
    """Farthest poses, three true captions, a picture and a split each; the same seed gives the same file."""
    flags = ["--build", "imagescript", "--poses", real[1]["tars"], *"--quota world=30 --quota world=5:test".split()]
    found, rows = build(tmp_path / "a", *flags, "--quota", "h36m=2")
    assert rows == build(tmp_path / "b", *flags, "--quota", "h36m=2")[1]
    assert [row["split"] for row in rows] == ["train"] * 30 + ["test"] * 5 + ["train"] * 2
    assert len({(row["source"], row["id"]) for row in rows}) == 37 and len(set(rows[0]["texts"])) == 3
    for record in found[::6]:
        front = data.face_front(torch.tensor(record["pose"])[None])[0]
        assert all(exact for text in record["texts"] for _, exact in data.check(text, front))
        assert data.cut(record, 336).size == (336, 336)
    close(torch.tensor(np.stack([record["pose"] for record in found[35:]])).sum(0), real[0][:2].sum(0))
    for quota in ("world=401", "dance=1", "world", "world=2:exam"):
        with pytest.raises(tokenizer.Mistake, match=quota):
            build(tmp_path / "c", "--build", "imagescript", "--quota", quota)


def test_imagediff_pairs_are_near_in_features_and_differ_in_codes(tmp_path, trained):
    """A is among the 100 nearest by eval.py's features and differs in 10 codes or more; no pair comes twice."""
    path, flags = tmp_path / "f.npy", ["--build", "imagediff", "--quota", "world=60", "--features"]
    evaluation.main(["--weights", str(trained[0]), "--poses", "world:train:400", "--features", str(path)])
    found, rows = build(tmp_path / "a", *flags, path)
    category = data.posecodes(data.face_front(data.World("train", 400).seen)).category
    pairs, features = [(int(row["start_id"]), int(row["id"])) for row in rows], np.load(path)
    assert len(pairs) > 50 and len({frozenset(pair) for pair in pairs}) == len(pairs)
    for (a, b), record in list(zip(pairs, found))[::9]:
        cosine = features @ features[b]
        assert data.differing(category[a], category[[b]])[0] >= 10 and (cosine > cosine[a]).sum() <= 100 and a != b
        start, pose = data.face_front(torch.tensor(np.stack([record["start"], record["pose"]])))
        assert all(exact for text in record["texts"] for _, exact in data.check(text, pose, start))
    np.save(path, features[:9])
    with pytest.raises(tokenizer.Mistake, match="each of the 400 poses"):
        build(tmp_path / "b", *flags, path)


def test_a_chat_model_may_refine_texts_but_not_lose_a_side(tmp_path, capsys):
    """Random weights lose every part: the texts are kept, and counted. What keeps all parts and sides is taken."""
    from transformers import LlamaConfig, LlamaForCausalLM
    spell = unipose.word_tokenizer(data.words())
    spell.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    spell.save_pretrained(tmp_path / "llm")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(spell), **sizes)).save_pretrained(tmp_path / "llm")
    flags = ["--build", "imagescript", "--quota", "world=4", "--refined", "3", "--refine"]
    rows = build(tmp_path / "a", *flags, tmp_path / "llm")[1]
    assert [row.get("refined", row["texts"][0]) for row in rows] == [row["texts"][0] for row in rows]
    assert "3 refined, 3 kept" in capsys.readouterr().out and len(data.read([f"refined:{tmp_path / 'a'}"])) == 3
    before = data.named("Both knees are bent. The left hand is up. The head is low.")
    assert before == {("left", "knee"), ("right", "knee"), ("left", "hand"), ("", "head")}
    assert before <= data.named("With the left knee and the right knee bent, they raise the left hand over the head.")
    assert not before <= data.named("Both knees are bent and the right hand is up, the head low.")
    with pytest.raises(tokenizer.Mistake, match="chat model"):
        build(tmp_path / "b", *flags, tmp_path)


def test_real_data_is_mixed_by_weight_and_trains_every_stage(real, trained, tmp_path):
    """Example k is a function of (seed, k); tasks follow from what a record holds; nano takes steps of each stage."""
    specs, path = real[1], tmp_path / "data.json"
    np.save(tmp_path / "eye.npy", np.eye(400))
    build(tmp_path / "script", "--build", "imagescript", "--quota", "world=4")
    build(tmp_path / "diff", "--build", "imagediff", "--quota", "world=6", "--features", tmp_path / "eye.npy")
    table = {"tokenizer": {specs["amass"]: 0.8, specs["smplx"]: 0.2}, "retrieval": {specs["v2"]: 1, specs["fix"]: 1},
             "align": {specs["v2"]: 70, specs["fix"]: 30},
             "project": {f"built:{tmp_path}/script": 1, f"built:{tmp_path}/diff": 1, specs["tars"]: 2}}
    one, two = (train.Recorded(table["align"], train.POSE_TASKS, seed=3) for _ in range(2))
    tasks = [one[k][0] for k in range(300)]
    assert 0.6 < np.mean([task in ("pose2text", "text2pose") for task in tasks]) < 0.8 and str(one[77]) == str(two[77])
    assert set(tasks) == set(train.POSE_TASKS)
    path.write_text(json.dumps(table))
    for stage in table:
        run_train(tmp_path / "w", "--init", trained[0], "--steps", 2, "--batch", 4, "--data", path, "--stage", stage)
    for wrong, told in (({"dance": {}}, "name stages"), ({"align": {}}, "name stages"), ([], "name stages"),
                        ({"align": {specs["tars"]: 1}}, "offers nothing"), ({"align": {"amass:no": 1}}, "the path"),
                        ({"align": {specs["v2"]: "a"}}, "name stages"), ({"retrieval": {specs["v2"]: 1}}, "posediff")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(tokenizer.Mistake, match=told):
            run_train(tmp_path / "x", "--data", path, "--stage", "retrieval" if "retrieval" in wrong else "align")
    assert not (tmp_path / "x").exists()


# ---- unipose.py ------------------------------------------------------------------------------------------------------
WORDS = "the left right knee elbow hand is bent straight raise move lower make this pose show describe . , ?".split()
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
A, B, TEXT = *poses(2), "the left knee is bent ."
QUESTIONS = {  # one example of each task as segments, answer last
    "pose2text": [("text", "describe", False), ("pose", A, False), ("text", TEXT, True)],
    "posediff": [("pose", A, False), ("text", "move", False), ("pose", B, False), ("text", TEXT, True)],
    "image2text": [("image", PICTURES[0], False), ("text", "describe this pose .", False), ("text", TEXT, True)],
    "imagediff": [("image", PICTURES[0], False), ("image", PICTURES[1], False), ("text", TEXT, True)],
    "text2pose": [("text", "make : " + TEXT, False), ("pose", A, True)],
    "image2pose": [("image", PICTURES[2], False), ("pose", B, True)],
    "edit": [("pose", A, False), ("text", "lower the right hand", False), ("pose", B, True)]}
PROMPTS = {task: segments[:-1] for task, segments in QUESTIONS.items()}


def nano(seed=0, words=WORDS, lora=False, **changes):
    """An untrained nano model that knows a few words; lora: with adapters that do something."""
    torch.manual_seed(seed)
    config = unipose.model_config("nano") | {"lora_alpha": 8} | changes  # alpha is not r, or its scale would not show
    model = unipose.UniPose(config, unipose.word_tokenizer(words)).eval()
    if lora:
        model.grow_lora()
        for module in model.modules():
            if isinstance(module, unipose.LoRALinear):
                module.B.data.normal_(0, 0.1)
    return model


def batch_of(model, *tasks):
    """The examples of some tasks (none given: all seven) as one training batch."""
    return unipose.collate([model.encode(QUESTIONS[task]) for task in tasks or QUESTIONS])


def reread(model, batch):
    """Hidden states (B,T,D) of a batch in one pass, without a cache."""
    mask, positions = unipose.mixed_mask(batch["block"], batch["valid"]), (batch["valid"].cumsum(1) - 1).clamp(min=0)
    return model.hidden(model.embed(batch["ids"], batch["slot"], batch["images"]), mask, positions)


def test_the_mask_is_what_a_triple_loop_says():
    """allowed = (j <= i) or (same block), nobody reads padding, and a row without anything to read reads itself."""
    rng = np.random.default_rng(0)
    block = torch.from_numpy(np.repeat(rng.integers(-1, 3, (4, 6)), 3, 1))
    valid = torch.from_numpy(rng.random((4, 18)) > 0.2)
    mask = unipose.mixed_mask(block, valid)
    assert mask.dtype == torch.float32 and mask.shape == (4, 1, 18, 18)
    for b, i, j in np.ndindex(4, 18, 18):
        same = block[b, i] == block[b, j] and block[b, i] >= 0
        allowed = ((j <= i or same) and valid[b, j]) or i == j
        assert (mask[b, 0, i, j] == 0) == bool(allowed), (b, i, j)


def test_the_queries_of_a_pose_are_blind_to_later_text_and_to_later_poses():
    """What follows changes nothing at the queries, another query of the same pose does."""
    model = nano()
    v, n = model.vocab, model.tokenizer.n_tokens
    pose = [v.p_open, *range(v.query0, v.query0 + n), v.p_close]
    block = torch.tensor([[-1] * 3 + [0] * n + [-1] * 4 + [1] * n + [-1]])

    def at_queries(ids):
        valid = torch.ones_like(block, dtype=torch.bool)
        rows = {"ids": torch.tensor([ids]), "block": block, "slot": torch.full_like(block, -1), "valid": valid}
        return reread(model, rows | {"images": None})[0, 3:3 + n]

    ids = [5, 6, *pose, 7, 8, *pose]
    base, text, later, inside = (list(ids) for _ in range(4))
    text[4 + n], later[-3], inside[2 + n] = 11, 12, ids[3]
    assert torch.equal(at_queries(base), at_queries(text)) and torch.equal(at_queries(base), at_queries(later))
    assert (at_queries(base) - at_queries(inside))[0].abs().max() > 1e-4  # the first query sees the last


def test_a_code_that_is_read_carries_its_place_where_the_size_says_so():
    """The same code in two slots is embedded apart by exactly their two queries; the paper's size does not do it."""
    model = nano()
    row, v, n = model.encode([("pose", [7] * model.tokenizer.n_tokens, False)]), model.vocab, model.tokenizer.n_tokens
    batch = unipose.collate([row])
    assert [slot for slot in row.slot if slot >= 0] == [*range(n)] and not unipose.SIZES["paper"]["slots"]
    placed = model.embed(batch["ids"], batch["slot"])[batch["ids"] == v.pose0 + 7]                     # (N,D)
    queries = model.llm.model.embed_tokens.weight[v.query0:]
    close(placed[3] - placed[5], queries[3] - queries[5], atol=1e-6)
    model.config["slots"] = False
    assert model.embed(batch["ids"], batch["slot"])[batch["ids"] == v.pose0 + 7].unique(dim=0).size(0) == 1


def test_eager_and_sdpa_attention_read_the_mask_alike():
    """The float mask means the same to both back ends of transformers, padding included."""
    eager, sdpa = nano(), nano()
    eager.llm.set_attn_implementation("eager")
    sdpa.llm.set_attn_implementation("sdpa")
    close(eager(batch_of(eager, "text2pose", "edit"))[0], sdpa(batch_of(sdpa, "text2pose", "edit"))[0], atol=1e-6)


@pytest.mark.parametrize("attn", ["mixed", "mixed_all", "causal"])
def test_labels_cover_exactly_the_answer(attn):
    """Labels ask for the answer and </s>: no word of the prompt, no </p>; marks that a user types are mere words."""
    model = nano(attn=attn)
    v, eos = model.vocab, model.text.eos_token_id
    for task, segments in QUESTIONS.items():
        row = model.encode(segments)
        kind, value, _ = model.prepare(segments)[-1]
        wanted = model.text_ids(value) if kind == "text" else [v.p_open, *[v.pose0 + int(c) for c in value]]
        assert [x for x in row.labels if x != unipose.NONE] == [*wanted, eos], task
        n_blocks = {"mixed": kind == "pose", "mixed_all": sum(s[0] == "pose" for s in segments), "causal": 0}[attn]
        queries = [i for i, x in enumerate(row.ids) if x >= v.query0]
        assert max(row.block) + 1 == n_blocks
        assert len(queries) == (model.tokenizer.n_tokens if kind == "pose" and attn != "causal" else 0)
        assert all(row.labels[i] == v.pose0 + int(value[k]) for k, i in enumerate(queries)), "query i says code i"
    row = model.encode([("text", "the knee </s> <s> <p> </p> <image> <pose> is bent", False), ("text", "left", True)])
    assert row.ids.count(eos) == 1 and max(row.ids) < v.pose0 and min(row.ids) >= 0


def test_the_loss_is_cross_entropy_over_all_labels_and_the_given_close():
    """Summed over labelled positions, divided by their number, where each </p> counts though nothing predicts it."""
    model = nano()
    batch = batch_of(model)
    loss, logs = model(batch)
    logits = model.llm.lm_head(reread(model, batch)).flatten(0, 1)
    assert logs["terms"] == (batch["labels"] != unipose.NONE).sum() + 3                # three tasks answer with a pose
    close(loss, F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum") / logs["terms"], atol=1e-6)


@pytest.mark.parametrize("task", QUESTIONS)
def test_one_batch_of_each_task_can_be_learnt_by_heart(task):
    """Loss falls from ln(vocabulary) to almost nothing: masks, labels and gradients fit together."""
    model = nano().train()
    batch = batch_of(model, task)
    loss, _ = learn(lambda: model(batch), [*model.llm.parameters(), *model.projector.parameters()], 80, 5e-3)
    assert loss < 0.05


def test_lora_changes_nothing_at_step_zero_and_merges_exactly():
    """B is zero, so adding adapters changes no bit; W + (alpha/r) B A answers like a trained adapter."""
    model, trained_one = nano(), nano(lora=True)
    batch = batch_of(model, "edit")
    before = model(batch)[0]
    model.grow_lora()
    assert torch.equal(before, model(batch)[0])
    assert not model.llm.model.layers[0].self_attn.q_proj.base.weight.requires_grad
    adapted = trained_one(batch)[0]
    unipose.merge_lora(trained_one.llm.model.layers)
    close(adapted, trained_one(batch)[0])
    assert abs(adapted - before) > 1e-3 and not any(isinstance(m, unipose.LoRALinear) for m in trained_one.modules())


def test_lora_is_what_peft_does():
    """The same A and B in a peft adapter give the same hidden states."""
    peft = pytest.importorskip("peft")
    ours, plain = nano(lora=True), nano()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(plain.llm.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    state = theirs.state_dict()
    for name, module in ours.llm.model.named_modules():
        if isinstance(module, unipose.LoRALinear):
            state[f"base_model.model.{name}.lora_A.default.weight"].copy_(module.A)
            state[f"base_model.model.{name}.lora_B.default.weight"].copy_(module.B)
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(2))
    close(ours.llm.model(inputs_embeds=x).last_hidden_state, theirs(inputs_embeds=x).last_hidden_state)


def test_golden_official_preprocessing():
    """Both branches give the official pixels, odd margins included, from Pillow and torch alone."""
    gold, paper = golden("official/preproc/image_preproc.npz"), unipose.SIZES["paper"]
    branches = {"clip": (paper["clip"]["image_size"], unipose.CLIP_MEAN, unipose.CLIP_STD, math.floor),
                "hmr": (paper["pose_vit"]["image_size"][0], unipose.POSE_MEAN, unipose.POSE_STD, round)}
    for name in (key.removesuffix("_u8") for key in gold.files if key.endswith("_u8")):
        for branch, how in branches.items():
            pixels = unipose.preprocess(Image.fromarray(gold[f"{name}_u8"]), *how)
            y, x = gold[f"{name}_{branch}_yx"].T
            assert np.abs(pixels[:, y, x].numpy() - gold[f"{name}_{branch}_vals"]).max() < 0.02


@pytest.mark.parametrize("changes", [
    {}, {"vision": "clip"}, {"vision": "pose", "projector": "linear"},
    {"llm": unipose.SIZES["nano"]["llm"] | dict(model_type="mistral", num_key_value_heads=1, sliding_window=None)}])
def test_either_eye_can_be_closed_and_mistral_takes_the_llamas_place(changes):
    """All tasks run with other eyes, projectors and LLMs; the patches of the first picture come first."""
    model = nano(**changes)
    assert type(model.llm).__name__.lower().startswith(model.config["llm"]["model_type"])
    width = 32 * (1 + (model.config["vision"] == "both"))
    features, batch = model.vision(PICTURES[:2]), batch_of(model, "imagediff")
    assert features.shape == (2, model.vision.n_patches, width) and model(batch_of(model))[0].isfinite()
    placed = model.embed(batch["ids"], batch["slot"], batch["images"])[batch["ids"] == unipose.IMAGE]
    close(placed, model.projector(features).flatten(0, 1))
    assert sample.generate(model, [PROMPTS["text2pose"]], ["pose"], max_new=3)[0].pose.shape == (22, 3, 3)


def test_the_papers_size_can_be_built_without_memory():
    """On the meta device: text | 2048 codes | 4 marks | 80 queries = 34,132 ids, 576 patches of 2304 channels."""
    with torch.device("meta"):
        model = unipose.UniPose(unipose.model_config("paper"))
        model.grow_lora()
    table, v = {name: n / 1e6 for name, n, _ in unipose.parameter_table(model)}, model.vocab
    assert (v.pose0, v.p_open, v.img_open, v.query0, v.size) == (32000, 34048, 34050, 34052, 34132)
    assert (model.vision.n_patches, model.vision.width) == (576, 2304)
    assert 7000 < table["LLM layers"] + table["embeddings"] + table["LM head"] < 7600
    assert 630 < table["pose ViT"] < 632 and 303 < table["CLIP"] < 305 and 12.3 < table["pose tokenizer"] < 13.9


def test_a_checkpoint_comes_back_as_it_was_and_halved(tmp_path):
    """load(save(model)) gives the same loss and EMA state; `--half` merges LoRA, halves the file, keeps the notes."""
    model = nano(lora=True)
    model.tokenizer.quantizer.code_count += 3
    unipose.save(model, tmp_path / "w", seed=7, stages=["align"])
    unipose.copy_half(tmp_path / "w", tmp_path / "half")
    again, half = unipose.load(tmp_path / "w"), unipose.load(tmp_path / "half")
    batch, config = batch_of(model), unipose.read_config(tmp_path / "half")
    loss = model(batch)[0]
    assert torch.equal(loss, again(batch)[0]) and abs(loss - half(batch)[0]) < 1e-2 and again.config["lora"]
    ours, theirs = model.tokenizer.state_dict(), again.tokenizer.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert config["seed"] == 7 and config["float16"] and not config["lora"]
    assert sorted(os.listdir(tmp_path / "w")) == ["config.json", "model.safetensors", "tokenizer.json"]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("w", "half")]
    assert sizes[1] < 0.55 * sizes[0]


def test_damaged_weights_are_named_in_one_sentence(tmp_path):
    """Cut off, broken, of another width: the user reads what and where, not a traceback."""
    for name, told in (("model.safetensors", "not a complete"), ("config.json", "expected"), ("config.json", "cannot")):
        unipose.save(nano(), tmp_path / "w")
        old = (tmp_path / "w" / name).read_bytes()
        wider = old.replace(b'"intermediate_size": 64', b'"intermediate_size": 96')
        (tmp_path / "w" / name).write_bytes(wider if told == "expected" else old[:len(old) // 2])
        assert told in refusals(lambda folder: unipose.load(tmp_path / folder), ["w"])["w"]


# ---- unipose.py: other people's weights ------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def official():
    """The golden release: its model, LoRA kept, and its tasks {name: segments, the answer last}."""
    cache, eyes = golden("official/cache/unipose").parent, golden("official/llm/visual.safetensors")
    given = golden("official/llm/toy_inputs.safetensors")
    pictures, tasks = golden("official/llm/toy_images.npz")["images_u8_hwc"], {}
    for heads in range(1, 17):  # no file of a release tells how many heads its pose ViT has
        with contextlib.suppress(tokenizer.Mistake):       # not a divisor
            model = unipose.load_official(cache, merge=False, num_attention_heads=heads)
            seen = model.vision(pictures[:2])[..., eyes["clip_features"].size(-1):]
            if (seen - eyes["pose_features"]).abs().max() < 1e-4:
                break
    ours = tokenizer.turn_root(given["poses"], tokenizer.UP)  # z up there, y up here
    for i, row in enumerate(golden("official/llm/toy_tasks.json")):
        a, b = (("pose", ours[given[k][i]]) for k in ("A_idx", "B_idx"))
        values = {"<caption>": ("text", row["caption"]), "<pose>": a, "<poseA>": a, "<poseB>": b}
        shown = iter([("image", pictures[given[k][i]]) for k in ("imgA", "imgB")])
        tasks[f"s{i}_{row['name']}"] = [
            (*(next(shown) if part == "<image>" else values.get(part, ("text", part))), side == "output")
            for side in ("input", "output") for part in data.SLOT.split(row["task"][side]) if part]
    return model, tasks


def official_ids(model, row):
    """Ids of an encoded row as the official files have them: a picture is one -200, queries are what they say."""
    said = [label if i >= model.vocab.query0 else i for i, label in zip(row.ids, row.labels)]
    return [-200 if i == unipose.IMAGE else i for k, i in enumerate(said) if i != unipose.IMAGE or said[k - 1] != i]


def unpacked(gold, name):
    """A packed mask of the golden files -> bool."""
    wide = gold[f"{name}_shape"].tolist()[-1]
    return torch.from_numpy(np.unpackbits(gold[f"{name}_allowed_packed"].numpy(), axis=-1)[..., :wide]).bool()


def test_golden_official_prompts_and_answers_have_the_official_ids(official, tmp_path, monkeypatch):
    """As the slow tokenizer cut them, with its setting `legacy` on and off."""
    model, gold = official[0], golden("official/llm/tokenizer.json")
    shutil.copytree(golden("official/cache/unipose"), tmp_path / "off")
    told = json.loads((tmp_path / "off/tokenizer_config.json").read_text())
    (tmp_path / "off/tokenizer_config.json").write_text(json.dumps(told | {"legacy": False}))
    known = {"{POSE_A}": ("pose", gold["poseA_ids"]), "{POSE_B}": ("pose", gold["poseB_ids"]),
             "<im_start><image><im_end>": ("image", torch.zeros(model.vision.n_patches, model.vision.width)),
             **{mark: ("ids", [i]) for mark, i in gold["specials"].items()}}
    marks = re.compile(f"({'|'.join(map(re.escape, known))})")
    for text, name in ((model.text, "ids"), (unipose.word_pieces(tmp_path / "off"), "ids_legacy_false")):
        monkeypatch.setattr(model, "text", text)
        for row in gold["items"] + gold["training_full"]:
            prompt, _, answer = row.get("prompt", row.get("full_prompt")).partition(" [/INST]")
            halves = (prompt.removeprefix("[INST] "), False), (answer.removeprefix(" ").removesuffix(" </s>"), True)
            segments = [(*known.get(part, ("text", part)), said) for half, said in halves
                        for part in marks.split(half) if part]
            assert official_ids(model, model.encode(segments)) == row[name], row
            asked = official_ids(model, model.encode([segment for segment in segments if not segment[2]]))
            assert asked == row[name][:len(asked)] and (name != "ids" or len(asked) == row.get("n_input", len(asked)))


def test_golden_official_eyes_and_projector_see_the_same(official):
    """CLIP's features come from LLaVA's own tower, the pose ViT's from TokenHMR, which `vit` shows layer by layer."""
    model, eyes, vit = official[0], golden("official/llm/visual.safetensors"), golden("official/vit/io.safetensors")
    features = model.vision(golden("official/llm/toy_images.npz")["images_u8_hwc"][:2])
    close(features, torch.cat([eyes["clip_features"], eyes["pose_features"]], -1), 1e-4)
    close(model.projector(features), eyes["visual_tokens"], 1e-4)
    pixels = (torch.tensor(golden("official/vit/image_u8.npz")["image_u8"]) / 255 - 0.5) / 0.25
    margin = (pixels.size(2) - model.vision.pose_size[1]) // 2
    close(model.vision.pose_vit.embeddings.patch_embeddings(pixels[..., margin:-margin]), vit["patch_tokens"], 1e-4)
    close(model.vision.pose_map(pixels[..., margin:-margin]), vit["feature_map"], 1e-4)


def test_golden_official_answers_alone_and_in_any_batch(official, monkeypatch):
    """Each row of each batch says what it says alone; masks, positions, embeddings and logits of both steps agree."""
    (model, tasks), gold = official, golden("official/llm/generate.safetensors")
    told, read, calls = golden("official/llm/generate.json"), model.hidden, []
    monkeypatch.setattr(model, "hidden", lambda *step: calls.append((*step, read(*step))) or calls[-1][-1])
    for group, facts in told.items():
        if group.startswith("trap"):                       # an official bug: pose A stands in both places
            continue
        names = [list(tasks)[i] for i in facts["samples"]]
        prompts = [[segment for segment in tasks[name] if not segment[2]] for name in names]
        calls.clear()
        answers = sample.generate(model, prompts)
        (x, mask, positions, _, h), *steps = calls[:]
        for name, answer in zip(names, answers):
            assert [model.text.bos_token_id, *answer.ids] == gold[f"{name}.output_ids"][0].tolist(), (group, name)
            if answer.pose is None:
                assert answer.text == told[name]["text"][0].strip()
            else:
                turns = tokenizer.aa_to_matrix(gold[f"{name}.body_pose_axis_angle"].view(22, 3))
                close(tokenizer.turn_root(answer.pose, tokenizer.UP.T), turns, 1e-3)
        wants = ["text" if answer.pose is None else "pose" for answer in answers]
        assert [a.ids for a in sample.generate(model, prompts, wants)] == [a.ids for a in answers]
        valid, mark = gold[f"{group}.prefill_mask"].bool(), gold[f"{group}.attention_mask_2d"].bool()
        for row, ids, attended in zip(map(model.encode, prompts), gold[f"{group}.input_ids"], mark):
            assert official_ids(model, row) == ids[attended].tolist()
        assert torch.equal(positions[valid], gold[f"{group}.prefill_positions"][valid])
        close(x.sum(-1)[valid], gold[f"{group}.prefill_embeds_rowsum"][valid], 1e-4)
        close(model.llm.lm_head(h[:, -1]), gold[f"{group}.prefill_logits_last"], 1e-4)
        if set(wants) == {"pose"}:                         # the official code goes wrong where rows disagree
            allowed = unpacked(gold, f"{group}.pose_step_mask4d")
            _, mask, positions, _, h = next(step for step in steps if step[0].size(1) > 1)
            assert torch.equal(mask[:, :, :allowed.size(2), :allowed.size(3)] == 0, allowed)
            assert torch.equal(positions[:, :-1], gold[f"{group}.pose_step_positions"])
            close(model.llm.lm_head(h[:, 1:-1]), gold[f"{group}.pose_step_logits"], 1e-4)


@pytest.mark.parametrize("group", ["text", "image"])
def test_golden_official_training_has_the_official_loss_and_gradients(official, group):
    """A batch and each sample alone; masks, embeddings, logits, and gradients of head, embedding and projector."""
    model, tasks = official
    gold = {name.removeprefix(group + "."): t for name, t in golden("official/llm/train_step.safetensors").items()
            if name.startswith(group)}
    rows = {tuple(official_ids(model, row)): row for row in map(model.encode, tasks.values())}
    chosen = [next(row for ids, row in rows.items() if list(ids) == given[:len(ids)] and not any(given[len(ids):]))
              for given in gold["input_ids"].tolist()]
    batch = unipose.collate(chosen)
    valid, bias, table = batch["valid"], model.projector[0].bias, model.llm.model.embed_tokens.weight
    seen = unipose.mixed_mask(batch["block"], valid)[:, 0] == 0
    model.zero_grad()
    loss, _ = model(batch)
    loss.backward()
    close(loss.detach(), gold["loss"][0])
    for row, alone in zip(chosen, gold["per_sample_loss"]):
        close(model(unipose.collate([row]))[0].detach(), alone)
    assert torch.equal(seen[valid], unpacked(gold, "mask4d")[:, 0][valid])
    x = model.embed(batch["ids"], batch["slot"], batch["images"])
    close(x.sum(-1)[valid], gold["inputs_embeds_rows_sum"][valid], 1e-4)
    logits = model.llm.lm_head(reread(model, batch))
    close(logits.logsumexp(-1)[valid], gold["logits_logsumexp"][valid], 1e-4)
    close(logits[:, -20:][valid[:, -20:]], gold["logits_last20"][valid[:, -20:]], 1e-4)
    for made, name in ((model.llm.lm_head.weight.grad.norm(dim=1), "gradrow_norm.lm_head.weight"),
                       (table.grad.norm(dim=1), "gradrow_norm.model.embed_tokens.weight"),
                       (torch.zeros_like(bias) if bias.grad is None else bias.grad, "grad.mm_projector.0.bias")):
        assert (made - gold[name]).norm() <= 1e-4 * gold[name].norm(), name


def test_golden_official_folder_is_a_model_like_any_other(official, tmp_path):
    """Merged, in our own layout and float16, as a plain Hugging Face folder, beside yacs settings: the same model."""
    import transformers
    (model, tasks), cache = official, tmp_path / "cache"
    shutil.copytree(golden("official/cache/unipose").parent, cache)
    held, yacs = torch.load(cache / "tokenhmr_model.ckpt"), types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = yacs.CfgNode(MODEL=yacs.CfgNode(BACKBONE="vit"))
    with pytest.MonkeyPatch.context() as patch:            # the package is not here, and need not be
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        torch.save(held | {"hyper_parameters": settings}, cache / "tokenhmr_model.ckpt")
    unipose.copy_half(cache, tmp_path / "own")
    unipose.write_llm(unipose.load(cache), tmp_path / "plain")
    batch = unipose.collate([model.encode(next(iter(tasks.values())))])
    loss, ids = model(batch)[0], batch["ids"]
    close(unipose.load(cache)(batch)[0], loss)
    close(unipose.load(tmp_path / "own")(batch)[0], loss, 1e-2)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    close(plain(ids).logits, model.llm(ids).logits, 1e-4)
    text, names = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain"), unipose.mark_names(model.vocab)
    assert text.convert_tokens_to_ids(names) == [*range(model.vocab.n_text, model.vocab.size)]


@pytest.mark.parametrize("file, damage, told", [
    ("BASE/model.safetensors", "gone", "liuhaotian"), ("unipose/adapter_model.safetensors", "gone", "L-yiheng"),
    ("clip-vit-large-patch14-336/config.json", "gone", "openai"), ("pose_vqvae/best_MPJPE.ckpt", "gone", "Drive"),
    ("BASE/model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}', "model-2.safetensors is"),
    ("tokenhmr_model.ckpt", "gone", "TokenHMR"),
    ("BASE/model.safetensors", "cut", "complete"), ("pose_vqvae/best_MPJPE.ckpt", "cut", "complete"),
    ("unipose/non_lora_trainables.bin", "code", "asks to run"), ("pose_vqvae/best_MPJPE.ckpt", "code", "asks to run"),
    ("tokenhmr_model.ckpt", "code", "asks to run"), ("BASE/model.safetensors", "nan", "NaN"),
    ("unipose/adapter_model.safetensors", "nan", "NaN"), ("unipose/adapter_model.safetensors", "wide", "expected"),
    ("BASE/model.safetensors", "wide", "expected"), ("BASE/model.safetensors", "name", "no part of UniPose"),
    ("BASE/model.safetensors", "fewer", "is missing"), ("unipose/adapter_model.safetensors", "fewer", "is missing"),
    ("unipose/adapter_config.json", '{"base_model_name_or_path": "x/vicuna-7b"}', "vicuna-7b"),
    ("unipose/added_tokens.json", '{"<pose_id_0>": 7}', "not where it must be"), ("BASE/config.json", "[", "JSON"),
    ("BASE/config.json", '{"model_type": "gpt2"}', "gpt2"), ("unipose/tokenizer.model", "cut", "sentencepiece"),
    ("unipose/tokenizer.json", "{}", "do not describe"), ("unipose/adapter_config.json", "{}", "None"),
    ("BASE/config.json", '{"model_type": "mistral", "num_attention_heads": "many"}', "do not describe")])
def test_a_damaged_golden_official_folder_is_refused_in_one_sentence(tmp_path, file, damage, told):
    """What is missing and where to get it, what does not fit what; code in a pickle is not run."""
    from safetensors.torch import save_file
    shutil.copytree(golden("official/cache/unipose").parent, tmp_path / "cache")
    path = tmp_path / "cache" / file.replace("BASE", unipose.BASE)
    state = load_file(path) if path.exists() and path.suffix == ".safetensors" else {}
    name = next((name for name in sorted(state) if "layers.1.mlp" in name), "")
    changed = {"nan": lambda: state | {name: state[name] * torch.nan}, "name": lambda: state | {"vae.x": torch.ones(1)},
               "wide": lambda: state | {name: torch.ones(3, 7)}, "fewer": lambda: state.pop(name) is None or state}
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "code":
        torch.save({"state_dict": {"a": torch.ones(1), "b": Evil(tmp_path / "ran")}}, path)
    elif damage in changed:
        save_file(changed[damage](), path)
    else:
        path.write_text(damage)
    with pytest.raises(tokenizer.Mistake, match=re.escape(told)) as mistake:
        unipose.load(tmp_path / "cache")
    assert "\n" not in str(mistake.value) and len(str(mistake.value)) < 900 and not (tmp_path / "ran").exists()


def downloads(folder, kind="llama", **sizes):
    """Folders of an LLM (llama | tied | llava-hf), CLIP and a pose ViT, as transformers saves them -> the modules."""
    import transformers as hf
    from tokenizers import Tokenizer, models
    nano_sizes, table = unipose.SIZES["nano"], ["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127)), "▁l"]
    (folder / "llm").mkdir(parents=True)
    text = Tokenizer(models.BPE({piece: i for i, piece in enumerate(table)}, [("▁", "l")], unk_token="<unk>"))
    text.save(str(folder / "llm/tokenizer.json"))
    llm = hf.LlamaConfig(vocab_size=len(table) + 9, **nano_sizes["llm"] | sizes, tie_word_embeddings=kind == "tied")
    llm, vit = hf.LlamaForCausalLM(llm), hf.VitPoseBackbone(hf.VitPoseBackboneConfig(**nano_sizes["pose_vit"]))
    eye = hf.CLIPVisionModel(hf.CLIPVisionConfig(**nano_sizes["clip"]))
    if kind == "llava-hf":
        both = hf.LlavaNextConfig(vision_config=eye.config, text_config=llm.config)
        whole = hf.LlavaNextForConditionalGeneration(both)
        llm.model, llm.lm_head, eye = whole.model.language_model, whole.lm_head, whole.model.vision_tower
        whole.save_pretrained(folder / "llm")
    else:
        llm.save_pretrained(folder / "llm", max_shard_size="25MB")
    eye.save_pretrained(folder / "clip")
    vit.save_pretrained(folder / "vit")
    return llm.eval(), eye.eval(), vit.eval()


@pytest.mark.parametrize("kind", ["llama", "tied", "llava-hf"])
def test_downloads_take_the_place_of_the_backbones(tmp_path, kind):
    """LLM, CLIP and pose ViT, saved by transformers, say and see the same inside our model, and come out again."""
    import transformers as hf
    llm, eye, vit = downloads(tmp_path, kind)
    clip = "" if kind == "llava-hf" else tmp_path / "clip"
    model = unipose.base_model(unipose.model_config("nano"), tmp_path / "llm", clip, tmp_path / "vit")
    ids, pixels, n = torch.arange(20)[None], torch.randn(2, 3, 64, 64), model.vocab.n_text
    row = model.encode(QUESTIONS["edit"])
    assert n == llm.config.vocab_size - 9 and model(unipose.collate([row]))[0].isfinite() and row.ids[-1] == 2
    close(model.llm(ids).logits[..., :n], llm(ids).logits[..., :n])
    close(model.vision.clip(pixels).last_hidden_state, eye(pixels).last_hidden_state)
    close(model.vision.pose_vit(pixels[..., 8:56]).feature_maps[-1], vit(pixels[..., 8:56]).feature_maps[-1])
    unipose.write_llm(model, tmp_path / "plain")
    close(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits, model.llm(ids).logits)


def test_loading_shards_needs_one_copy_of_the_weights_and_one_shard(tmp_path):
    """Some 100 MB in shards of 25: how far a process grows, at its largest, over what it was after a small load."""
    downloads(tmp_path / "small")
    downloads(tmp_path / "big", hidden_size=640, num_hidden_layers=4, intermediate_size=2560)
    code = """import re, sys, unipose
for folder in sys.argv[1:]:
    memory = {name: 1024 * int(n) for name, n in re.findall(r"(Vm\\w+):\\s+(\\d+)", open("/proc/self/status").read())}
    model = unipose.base_model(unipose.model_config("nano"), folder + "/llm", folder + "/clip", folder + "/vit")
held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(held, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024 - memory["VmRSS"])"""
    run, shards = run_script("-c", code, tmp_path / "small", tmp_path / "big"), unipose.shards(tmp_path / "big/llm")
    (weights, growth), biggest = map(int, run.stdout.split()), max(path.stat().st_size for path in shards)
    assert len(shards) > 3 and weights > 1e8 and growth < weights + biggest + 1e7, (weights, growth, biggest)


def test_training_begins_on_downloads_and_skips_the_backbones(tmp_path):
    """`--llm`, `--clip`, `--pose-vit` stand in for the first stage; half of them, or a used folder, is a mistake."""
    _, _, vit = downloads(tmp_path)
    own = ["--llm", tmp_path / "llm", "--clip", tmp_path / "clip", "--pose-vit", tmp_path / "vit"]
    state = run_train(tmp_path / "w", "--stage", "tokenizer", "--steps", 2, "--batch", 4, *own)
    assert torch.equal(state["vision.pose_vit.embeddings.position_embeddings"], vit.embeddings.position_embeddings)
    run_train(tmp_path / "w", "--stage", "align", "--steps", 2, "--batch", 4)
    for wrong, told in (([*own, "--stage", "tokenizer"], "begins a new model"), (own[:2], "come together")):
        with pytest.raises(tokenizer.Mistake, match=told):
            run_train(tmp_path / "w", *wrong)


def test_the_papers_memory_is_counted_for_what_each_stage_trains():
    """By the patterns of train.py's own table: what learns takes 16 bytes, the rest 2, the pose tokenizer 4."""
    with torch.device("meta"):
        model = unipose.UniPose(unipose.model_config("paper"))
        model.grow_lora()
    rows = {stage: row for stage, *row in unipose.memory_table(model)}
    assert all(train.STAGES[stage].trains["paper"] == unipose.LEARNS[stage] for stage in rows if stage != "answer")
    assert rows["align"][0] == 2 * 34132 * 4096 + 64 * 32 * (3 * (4096 + 14336) + 2 * (4096 + 4096) + 2 * (4096 + 1024))
    assert rows["align"][1] == pytest.approx(rows["answer"][1] + 14e-9 * rows["align"][0]) and rows["answer"][0] == 0


# ---- sample.py -------------------------------------------------------------------------------------------------------
def test_a_pose_falls_out_of_one_step():
    """Codes are the argmax of the queries in one uncached pass, pose codes even where the head likes words better."""
    model = nano(3)
    v, n = model.vocab, model.tokenizer.n_tokens
    model.llm.lm_head.weight.data[:v.pose0] *= 50
    answer = sample.generate(model, [PROMPTS["edit"]], ["pose"], max_new=3)[0]
    assert answer.ids[0] == v.p_open and answer.ids[n + 1] == v.p_close
    assert answer.ids[1:n + 1] == [v.pose0 + code for code in answer.codes]
    batch = batch_of(model, "edit")
    at_queries = model.llm.lm_head(reread(model, batch))[batch["ids"] >= v.query0]
    assert at_queries[:, v.pose0:v.p_open].argmax(-1).tolist() == answer.codes
    assert torch.equal(answer.pose, model.tokenizer.decode(torch.tensor([answer.codes]))[0])


def test_cached_decoding_is_uncached_decoding():
    """Text, and codes of a causal model, are the argmax of reading everything again after each token."""
    model, question = nano(4), PROMPTS["posediff"]
    answer, row = sample.generate(model, [question], ["text"], max_new=12)[0], model.encode(question)
    for token in answer.ids:
        causal = [-1] * len(row.ids)
        h = reread(model, unipose.collate([unipose.Sequence(row.ids, row.ids, causal, row.slot, [])]))[0, -1]
        assert model.llm.lm_head(h)[:model.vocab.n_text].argmax() == token
        row.ids.append(token)
        row.slot.append(-1)
    model, question, v = nano(7, attn="causal"), PROMPTS["text2pose"], model.vocab
    codes = sample.generate(model, [question], ["pose"], max_new=40)[0].codes
    batch = unipose.collate([model.encode([*question, ("pose", codes, True)])])
    start = batch["ids"][0].tolist().index(v.p_open)
    said = model.llm.lm_head(reread(model, batch))[0, start:start + model.tokenizer.n_tokens, v.pose0:v.p_open]
    assert said.argmax(-1).tolist() == codes


@pytest.mark.parametrize("decode", sample.DECODINGS)
def test_every_row_gets_the_answer_it_gets_alone(decode):
    """Rows that differ in task, in length and in what they make do not disturb each other, in any order."""
    model, wants, prompts = nano(5), [s[-1][0] for s in QUESTIONS.values()], list(PROMPTS.values())
    for layer in model.llm.model.layers:
        layer.self_attn.q_proj.weight.data *= 50           # an untrained model hardly minds who stands where
    alone = [sample.generate(model, [p], [w], decode, max_new=30)[0] for p, w in zip(prompts, wants)]
    for order in (list(range(7)), [6, 1, 5, 0, 3, 2, 4]):
        together = sample.generate(model, [prompts[i] for i in order], [wants[i] for i in order], decode, max_new=30)
        for i, answer in zip(order, together):
            assert answer.ids == alone[i].ids and answer.text == alone[i].text
            assert (answer.pose is None) == (wants[i] == "text")
            if answer.pose is not None:
                close(answer.pose, alone[i].pose, atol=1e-4)


def test_a_vote_goes_to_the_pose_that_most_draws_resemble():
    """A sure distribution is its argmax; a torn one gives what the majority of the draws say."""
    model = nano()
    model.tokenizer.quantizer.codebook.normal_()           # untrained codes are all alike
    sure = torch.full((model.tokenizer.n_tokens, 64), -30.0).scatter(1, torch.arange(20)[:, None], 30.0)
    assert torch.equal(sample.most_usual(model, sure), sure.argmax(-1))
    torn = torch.full_like(sure, -30.0)
    torn[:, 5], torn[0, 9] = 0, -1                         # only the first query is torn
    draws = sample.pick(torn.expand(16, -1, -1), 1.0, torch.Generator().manual_seed(0))[:, 0]
    assert sample.most_usual(model, torn)[0] == draws.mode().values


def test_samples_differ_and_repeat_with_their_seed():
    """--n with a temperature gives different poses, and the same ones again from the same seed."""
    model, codes = nano(8), []
    for generator in map(torch.Generator().manual_seed, (1, 1, 2)):
        answers = sample.generate(model, [PROMPTS["text2pose"]] * 3, ["pose"] * 3, "argmax", 1.0, generator, max_new=2)
        codes.append([tuple(answer.codes) for answer in answers])
    assert codes[0] == codes[1] != codes[2] and len(set(codes[0])) == 3


# ---- eval.py ---------------------------------------------------------------------------------------------------------
def test_golden_official_pose_errors():
    """MPJPE from the root and PA-MPJPE equal the official evaluation; a similarity is forgiven, a mirror image not."""
    gold = golden("official/metrics/metrics.npz")
    made, truth = torch.tensor(gold["pred"]), torch.tensor(gold["gt"])
    np.testing.assert_allclose(evaluation.mpjpe(made, truth) / 1000, gold["mpjpe_root"], atol=1e-5)
    np.testing.assert_allclose(evaluation.pa_mpjpe(made, truth) / 1000, gold["pampjpe"], atol=1e-5)
    np.testing.assert_allclose(evaluation.similarity_align(made, truth), gold["pa_aligned"], atol=1e-4)
    copied = 0.3 * truth @ poses(1)[0, 0] + 5
    assert evaluation.pa_mpjpe(copied, truth).max() < 1e-2 and evaluation.pa_mpjpe(copied * FLIP, truth).min() > 10


def test_joint_errors_are_millimetres_and_forgive_what_they_should():
    """One of 22 joints 22 mm off is 1 mm; moving the body costs nothing; PA forgives a similarity, but not a mirror."""
    truth = torch.randn(3, 22, 3, generator=torch.Generator().manual_seed(0))
    made = truth + 5.0
    made[:, 7, 1] += 0.022
    close(evaluation.mpjpe(made, truth), torch.ones(3), atol=1e-2)
    turned = 1.7 * truth @ tokenizer.aa_to_matrix(torch.tensor([0.3, 1.2, -0.4])).T + 2
    assert evaluation.pa_mpjpe(turned, truth).max() < 1e-2 < 10 < evaluation.pa_mpjpe(truth * FLIP, truth).min()


def test_bleu_and_rouge_l_equal_sacrebleu_and_rouge_score():
    """Corpus BLEU-4, 13a tokens, no smoothing, case kept; mean ROUGE-L F1 without stemming."""
    sacrebleu, rouge = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    words = "the left arm is bent, at 1.5 metres; half-bent (almost) 3-4 L/R knee's up... Down! 10,000 a_b".split()
    rng, scorer = random.Random(0), rouge.RougeScorer(["rougeL"], use_stemmer=False)
    for n in (1, 1, 2, 60, 60):
        made = [" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(n)]
        truth = [" ".join(w for w in text.split() if rng.random() < 0.8) or "none" for text in made]
        for a, b in ((made, truth), (truth, made), (made, made), ([""] * n, made)):
            theirs = sacrebleu.corpus_bleu(a, [b], smooth_method="none").score / 100
            assert evaluation.bleu4(a, b) == pytest.approx(theirs, abs=1e-9)
            theirs = [scorer.score(y, x)["rougeL"].fmeasure for x, y in zip(a, b)]
            assert evaluation.rouge_l(a, b) == pytest.approx(np.mean(theirs), abs=1e-9)


def test_a_true_text_has_precision_and_recall_1_and_silence_0(world):
    """A caption is perfect for its own pose, exactly as well; differences are judged from their source."""
    own, partners = world.poses[0:80:2], world.poses[1:80:2]
    texts, changes = evaluation.tell(own, None, seed=0), evaluation.tell(partners, own, seed=0)
    marks = evaluation.text_truth(texts, texts, own)
    assert set(marks) == {"precision", "precision_exact", "recall", "f1"} and min(marks.values()) > 1 - 1e-6
    assert evaluation.pose_truth(texts, own) == {"statement_accuracy": 1, "statement_accuracy_exact": 1}
    assert set(evaluation.text_truth([""] * 40, texts, own).values()) == {0.0}
    others = evaluation.text_truth(texts[1:] + texts[:1], texts, own)
    assert 0 < others["recall"] < 0.7 and 0 < others["precision_exact"] <= others["precision"] < 0.8
    assert evaluation.pose_truth(changes, partners, own)["statement_accuracy_exact"] == 1
    assert evaluation.pose_truth(changes, own, own)["statement_accuracy"] < 0.5
    line = texts[0].split(". ")[0]                         # said nine times it counts once, babble counts against it
    one, many = (evaluation.text_truth([f"{line}. " * n + "Bla bla."], texts[:1], own[:1]) for n in (1, 9))
    assert one == many and 0 < one["precision"] < 1 and 0 < one["recall"] < 0.5


def test_golden_official_retrieval_figures():
    """R-precision in groups of 32, recall both ways, the matching score and FID equal the official evaluation."""
    gold = golden("official/metrics/metrics.npz")
    a, b, whole = torch.tensor(gold["embA"]), torch.tensor(gold["embB"]), int(gold["R32_denominator"].item())
    tops = range(1, 1 + len(gold["recall_A2B_top1to20"]))
    np.testing.assert_allclose(evaluation.r_precision(a, b), gold["R32_top3_counts"] / whole, atol=1e-5)
    np.testing.assert_allclose(evaluation.recall_at(a, b, tops), gold["recall_A2B_top1to20"], atol=1e-5)
    np.testing.assert_allclose(evaluation.recall_at(b, a, tops), gold["recall_B2A_top1to20"], atol=1e-5)
    assert (a[:whole] * b[:whole]).sum().item() == pytest.approx(gold["R32_matching_sum"].item(), abs=1e-4)
    assert evaluation.frechet(a, b) == pytest.approx(gold["fid"].item(), abs=1e-4)
    # the file does not say how many rows made the singular one, only that they are fewer than the dimensions
    singular = [evaluation.frechet(a[:n], b[:n]) for n in range(2, a.size(1) + 1)]
    assert min(abs(value - gold["fid_singular"].item()) for value in singular) < 1e-4


def test_retrieval_overfits_32_poses_and_32_pairs(world):
    """Both rulers learn whose text is whose; a text is embedded alike alone and beside longer ones; a tie is no hit."""
    torch.manual_seed(0)
    text, pairs = unipose.word_tokenizer(data.words()), world.poses[:64].unflatten(0, (32, 2))
    ruler = evaluation.Retrieval(len(text), d=32)
    captions, changes = evaluation.tell(pairs[:, 0], None, 0), evaluation.tell(pairs[:, 1], pairs[:, 0], 0)
    for people, texts in ((pairs[:, 0], captions), (pairs, changes)):
        ids, mask = evaluation.read_texts(text, texts)
        loss, logs = learn(lambda: ruler(people, ids, mask), ruler.parameters(), 80, 3e-3)
        assert logs["top1"] > 0.95 and loss < 0.5
    together = ruler.embed_text(*evaluation.read_texts(text, [*captions[:3], "The head.", ""]))
    close(together[3:4], ruler.embed_text(*evaluation.read_texts(text, ["The head."])), atol=1e-6)
    perfect = torch.eye(40)                                # a tie is not found, or the mean pose would win every table
    assert evaluation.r_precision(perfect, perfect) == [1, 1, 1] and evaluation.recall_at(perfect, perfect)[0] == 1
    assert evaluation.r_precision(perfect, perfect[:1].expand(40, -1)) == [0, 0, 0]


def test_the_report_holds_figures_baselines_and_ceilings_of_every_task(trained, tmp_path, capsys):
    """`eval.py --json` writes fractions and millimetres in the promised layout, and nothing beats the truth."""
    flags = ["--weights", str(trained[0]), "--n", "32", "--pool", "32", "--decode", "argmax,soft"]
    evaluation.main([*flags, "--json", str(tmp_path / "eval.json")])
    report, printed = json.loads((tmp_path / "eval.json").read_text()), capsys.readouterr().out
    assert {"size", "seed", "split", "n", "body"} <= set(report) and {"mpjpe", "active"} <= set(report["tokenizer"])
    must_beat = {"text2pose": {"nearest_caption"}, "image2pose": {"nearest_feature"}, "edit": {"input_pose"}}
    for task, (_, target) in data.TASKS.items():
        figures = report["tasks"][task]
        best = figures["ceilings"]["ground_truth"]
        assert must_beat.get(task, {"random_caption"}) <= set(figures["baselines"]) and task in printed
        assert len(figures["r_precision"]) == 3 and len(figures["recall_at"]) == 4
        if target == "pose":
            assert {"mpjpe", "pa_mpjpe", "fid", "statement_accuracy", "statement_accuracy_exact"} <= set(figures)
            assert best["mpjpe"] < 1e-3 < figures["mpjpe"] and best["statement_accuracy_exact"] == 1
            assert set(figures["decoding"]) == {"soft"} and best["fid"] == pytest.approx(0, abs=1e-5)
        else:
            assert {"bleu4", "rouge_l", "precision", "precision_exact", "recall", "f1"} <= set(figures)
            assert best["precision_exact"] == 1 and figures["precision"] < best["precision"] and "fid" not in figures
    assert set(evaluation.speed(unipose.load(trained[0]), repeats=1)["latency_ms"]) == set(data.TASKS)


# ---- train.py --------------------------------------------------------------------------------------------------------
SMALL = ["--size", "nano", "--people", "32", "--photos", "8"]


def run_train(out, *flags):
    """train.main in this process, its printing swallowed -> the tensors it wrote."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*SMALL, "--out", str(out), *map(str, flags)])
    return unipose.read_tensors(out / "model.safetensors")


def test_nano_trains_all_six_stages_in_under_90_seconds(trained):
    """One command, one thread, from nothing: every stage learns, and the folder holds all that a later run needs."""
    out, seconds, printed = trained
    config = json.loads((out / "config.json").read_text())
    assert seconds < 90 and config["stages"] == list(train.STAGES) and set(config["seconds"]) == set(train.STAGES)
    assert {"seed", "command", "git", "torch", "transformers"} <= set(config)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for stage in train.STAGES:
        losses = [row["loss"] for row in rows if row["stage"] == stage]
        assert len(losses) >= 2 and all(map(math.isfinite, losses)) and stage in printed
        assert losses[-1] < losses[0] or stage not in ("tokenizer", "align")
    assert Image.open(out / "loss.png").size == (1080, 480) and not (out / "train_state.safetensors").exists()


@pytest.mark.parametrize("stage", train.STAGES)
def test_each_stage_changes_exactly_what_it_trains(trained, tmp_path, stage):
    """Two steps of a stage move the tensors that its row names, and not one bit of any other."""
    before, flags = unipose.read_tensors(trained[0] / "model.safetensors"), ["--steps", 2, "--batch", 4, "--lr", 0.01]
    after = run_train(tmp_path / "w", "--init", trained[0], "--stage", stage, *flags)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    named = {name for name in before if re.match(train.STAGES[stage].trains["nano"], name)}
    # what no gradient reaches: CLIP's last layer (features are taken before it), and words that were not in the batch
    assert moved <= named and len(moved) > 0.5 * len(named), sorted(moved - named)[:3]
    if stage == "instruct":
        assert all(re.search(r"\.[AB]$|embed|lm_head|projector", name) for name in moved)


@pytest.mark.parametrize("stage", ["tokenizer", "align", "instruct"])
def test_a_run_that_was_cut_off_goes_on_bit_by_bit(trained, tmp_path, monkeypatch, stage):
    """Four steps, and two steps, a cut and --resume, end in the same weights; --resume refuses other settings."""
    flags = ["--stage", stage, "--init", trained[0], "--steps", 4, "--save_every", 2, "--batch"]
    whole, plain = run_train(tmp_path / "whole", *flags, 4), train.gradient

    def cut(job, learning, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return plain(job, learning, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "gradient", cut)
        run_train(tmp_path / "cut", *flags, 4)
    with pytest.raises(tokenizer.Mistake, match=r"--batch 4 \(now 2\)"):
        run_train(tmp_path / "cut", *flags, 2, "--resume")
    resumed = run_train(tmp_path / "cut", *flags, 4, "--resume")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_stages_trained_side_by_side_are_joined(tmp_path):
    """--init A,B goes on from A with what B alone has been through; a folder of another size is refused."""
    nano = ["--size", "nano", "--steps", "2", "--people", "32", "--photos", "16", "--device", "cpu"]
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    train.main([*nano, "--stage", "tokenizer", "--out", a])
    train.main([*nano, "--stage", "backbones", "--out", b])
    config = train.Config(stage="align", size="nano", init=f"{a},{b}")
    model, _, notes = train.start_from(config, tmp_path / "c", {})
    state, ours, theirs = model.state_dict(), *(unipose.load(folder).state_dict() for folder in (a, b))
    assert notes["stages"] == ["tokenizer", "backbones"] and set(notes["commands"]) == {"tokenizer", "backbones"}
    assert all(torch.equal(value, (theirs if key.startswith("vision.") else ours)[key]) for key, value in state.items())
    notes = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(notes | {"size": "tiny"}))
    with pytest.raises(tokenizer.Mistake, match="cannot be joined"):
        train.start_from(config, tmp_path / "c", {})


def test_however_a_batch_is_cut_the_same_model_comes_out(trained, tmp_path):
    """--accumulate 4, two gloo processes under torchrun and --checkpointing train the model that one process trains."""
    flags = ["--stage", "instruct", "--init", trained[0], "--steps", 3, "--batch", 8]
    one, start = run_train(tmp_path / "one", *flags), unipose.read_tensors(trained[0] / "model.safetensors")
    run = run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *SMALL, *flags,
                     "--out", tmp_path / "two")
    assert run.returncode == 0, run.stderr[-2000:]
    learnt = [name for name in one if not torch.equal(one[name], start[name])]
    others = {"processes": unipose.read_tensors(tmp_path / "two" / "model.safetensors"),
              "accumulated": run_train(tmp_path / "four", *flags, "--accumulate", 4),
              "checkpointed": run_train(tmp_path / "again", *flags, "--checkpointing")}
    # Adam divides by the gradient's size, so rounding shows where a gradient is almost zero: compare whole tensors
    for how, other in others.items():
        apart = {k: (one[k] - other[k]).norm() / ((one[k] - start[k]).norm() + 1e-6) for k in one if k in learnt}
        assert max(apart.values()) < 0.02, (how, max(apart, key=apart.get), max(apart.values()))


@pytest.mark.parametrize("flags, told", [
    ("--stage dance", "not one of"), ("--stage align", "needs tokenizer"), ("--attn diagonal", "not one of"),
    ("--stage align --batch 7 --accumulate 2", "does not cut into 2 parts"), ("--people 3", "come in pairs"),
    ("--stage tokenizer --accumulate 2", "leave --accumulate out"), ("--steps -1", "--steps -1 must be at least 0"),
    ("--photos 64", "is more than --people"), ("--size paper", "does not read yet"), ("--device cuda:99", "cuda:99"),
    ("eval --tasks dance", "--tasks"), ("eval --size huge", "--size"), ("eval --split exam", "--split"),
    ("eval --decode guess", "--decode"), ("eval --n 0", "--n")])
def test_impossible_settings_are_refused_before_anything_is_computed(tmp_path, flags, told):
    """A sentence, at once: not a crash after an hour."""
    with pytest.raises(tokenizer.Mistake, match=told):
        evaluation.main(flags.split()[1:]) if "eval" in flags else run_train(tmp_path / "w", *flags.split())
    assert not (tmp_path / "w").exists()


# ---- the house -------------------------------------------------------------------------------------------------------
def test_imports_run_one_way():
    """tokenizer <- {data, unipose} <- sample <- eval <- train; data and unipose do not know each other."""
    order = {"tokenizer": "", "data": "tokenizer", "unipose": "tokenizer", "sample": "tokenizer data unipose",
             "eval": "tokenizer data unipose sample", "train": "tokenizer data unipose sample eval"}
    for name, allowed in order.items():
        nodes = list(ast.walk(ast.parse((HERE / f"{name}.py").read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert imported & set(order) <= set(allowed.split()), name
    assert {path.stem for path in HERE.glob("*.py")} == {*order, "test_unipose"}


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory):
    """A folder of everything that people hand over by mistake."""
    folder = tmp_path_factory.mktemp("bad files, übel")
    (folder / "text.png").write_text("this is not a picture")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    Image.new("RGB", (64, 64)).save(folder / "fine.png")
    (folder / "half.png").write_bytes((folder / "fine.png").read_bytes()[:-40])
    fine = np.broadcast_to(np.eye(3, dtype=np.float32), (22, 3, 3))
    for name, array in (("fine", fine), ("shape", fine[:10]), ("nan", fine * np.nan), ("scaled", 2 * fine),
                        ("object", np.array([{"a": 1}], dtype=object))):
        np.save(folder / f"{name}.npy", array)
    (folder / "empty weights").mkdir()
    (folder / "code.pkl").write_bytes(pickle.dumps(Evil(folder / "ran")))
    return folder


@pytest.mark.parametrize("flags, told", [
    (["--task=image2text", "--image=no.png"], "no image"), (["--task=image2text", "--image=text.png"], "not a picture"),
    (["--task=image2text", "--image=dot.png"], "1x1 pix"), (["--task=image2text", "--image=huge.png"], "one too large"),
    (["--task=image2text", "--image=half.png"], "cannot be decoded"), (["--image", "fine.png"], "two ways"),
    (["--pose", "no.npy"], "no.npy"), (["--pose", "shape.npy"], "shape"), (["--pose", "nan.npy"], "NaN"),
    (["--pose", "scaled.npy"], "not made of rotations"), (["--pose", "object.npy"], "object"),
    (["--pose", "fine.npy"] * 3, "at most 2"), (["--text", ""], "empty"), (["--text", "knee " * 10_000], "10000 words"),
    (["--task", "edit", "--pose", "fine.npy"], "edit takes 1 pose and 1 text"), (["--task", "dance"], "not one of"),
    (["--weights", "empty weights"], "has no config.json"), (["--weights", "nowhere"], "no weights folder"),
    (["--body", "code.pkl", "--pose", "fine.npy"], "code.pkl"), (["--decoed", "soft"], "--decode"),
    (["--n", "0", "--text", "a"], "--n"), (["--n", "2", "--decode", "soft", "--text", "a"], "one pose of all"),
    (["--decode", "fast"], "not one of")])
def test_a_users_mistake_is_one_sentence(trained, bad_files, tmp_path, monkeypatch, flags, told):
    """What is wrong, where, and what to do; nothing is written, and no pickle is run."""
    monkeypatch.chdir(bad_files)
    weights = [] if "--weights" in flags else ["--weights", str(trained[0])]
    with pytest.raises(tokenizer.Mistake, match=re.escape(told)) as caught, contextlib.redirect_stderr(io.StringIO()):
        sample.main([*flags, *weights, "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (tmp_path / "out").exists() and not (bad_files / "ran").exists()


def test_a_mistake_ends_a_script_with_code_2_and_no_traceback(tmp_path):
    """The same from the shell, for every script: one line on standard error."""
    for script in ("sample.py", "eval.py", "unipose.py"):
        run = run_script(script, "--weights", tmp_path / "nowhere")
        assert run.returncode == 2 and run.stderr.startswith("error: there is no weights folder")
        assert run.stderr.count("\n") == 1 and not run.stdout.startswith("Traceback")


def test_a_full_disk_leaves_nothing_half_written(trained, tmp_path):
    """No space for a picture or a checkpoint: exit code 2, one sentence, no file, and the old one still whole."""
    run = run_script("sample.py", "--weights", trained[0], "--text", "The left knee is straight.",
                     "--out", tmp_path / "o", limit=3000)
    assert run.returncode == 2 and "cannot write" in run.stderr and "Traceback" not in run.stderr
    assert not list((tmp_path / "o").glob("*.png")) and not list((tmp_path / "o").glob(".*"))
    shutil.copytree(trained[0], tmp_path / "w")
    before = (tmp_path / "w" / "model.safetensors").read_bytes()
    run = run_script("train.py", *SMALL, "--stage", "project", "--steps", 1, "--batch", 2, "--out", tmp_path / "w",
                     limit=100_000)
    assert run.returncode == 2 and "cannot write" in run.stderr and "Traceback" not in run.stderr
    assert (tmp_path / "w" / "model.safetensors").read_bytes() == before
    assert not list((tmp_path / "w").glob(".*"))


def test_the_tour_answers_seven_tasks_and_draws_them(trained, tmp_path):
    """`python sample.py` without a question: named as in TASKS, one sheet, poses that can be read back."""
    run = run_script("sample.py", "--weights", trained[0], "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    assert all(re.search(rf"^{task}   ", run.stdout, re.M) for task in data.TASKS)
    assert Image.open(tmp_path / "tour.png").height > 7 * 256
    assert tokenizer.read_pose(tmp_path / "edit.npz").shape == (22, 3, 3)


def test_an_answer_is_written_where_it_is_wanted(trained, tmp_path):
    """--n poses, a picture of them, and the pose file taken as the next question; strange words are mentioned."""
    weights = ["--weights", str(trained[0]), "--out", str(tmp_path)]
    shown, warned = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(warned):
        sample.main(["--text", "The left knee is straight, quoth he.", "--n", "3", *weights])
        sample.main(["--pose", str(tmp_path / "text2pose_2.npz"), *weights])
    assert {"text2pose_1.npz", "text2pose_3.npz", "text2pose.png", "pose2text.png"} <= set(os.listdir(tmp_path))
    assert "quoth" in warned.getvalue() and "pose2text.png" in shown.getvalue()


@pytest.mark.parametrize("script", ["tokenizer", "data", "unipose", "sample", "eval", "train"])
def test_help_is_complete_and_quick(script):
    """Every flag with its sentence, in what importing torch takes."""
    begun = time.perf_counter()
    run = run_script(f"{script}.py", "--help")
    assert run.returncode == 0 and time.perf_counter() - begun < 10  # 1.5 s alone; this machine may be busy
    tree = ast.parse((HERE / f"{script}.py").read_text())
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    for field in (node.target.id for node in config.body if isinstance(node, ast.AnnAssign)):
        assert re.search(rf"--(\[no-\])?{field}\b[^\n]*(\n +)?\s+\w+", run.stdout), field


def test_every_command_of_the_readme_exists():
    """Files, flags and values of the README's commands are real."""
    readme = (HERE / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.S)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    commands = [words for line in lines for words in re.findall(r"(?:python|torchrun [^ ]+) (\w+\.py[^&]*)", line)]
    assert len(commands) >= 8 and any("-m pytest -q" in line for line in lines)
    for command in commands:
        script, *rest = shlex.split(command)
        fields = {field.name for field in dataclasses.fields(importlib.import_module(script[:-3]).Config)}
        assert {word[2:] for word in rest if word.startswith("--")} <= fields, command


def test_the_readme_counts_lines_truly():
    """The reading order says how long each file is; a tenth off is a lie."""
    for name, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", (HERE / "README.md").read_text()):
        assert abs(len((HERE / name).read_text().splitlines()) - int(lines)) <= 0.1 * int(lines), name
