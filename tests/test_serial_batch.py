"""SerialBatch against mujoco.batch.Batch, bit for bit, in everything that the families use."""

from __future__ import annotations

import copy
import os

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from expecting import refused

from metarl.envs import make_family
from metarl.envs.mujoco import family as mujoco_vector
from metarl.envs.mujoco.serial_batch import SerialBatch

batch = pytest.importorskip("mujoco.batch")

STAGES = [
    int(getattr(mujoco.mjtStage, f"mjSTAGE_{name}")) for name in ("NONE", "POS", "VEL", "ACC")
]
FIELDS = ["qpos", "qvel", "ctrl", "time", "qacc_warmstart", "xfrc_applied", "eq_active"]


def model(body: str) -> mujoco.MjModel:
    mujoco.set_mju_user_warning(lambda message: None)
    assets = os.path.join(os.path.dirname(gym.__file__), "envs", "mujoco", "assets")
    spec = mujoco.MjSpec.from_file(os.path.join(assets, f"{body}.xml"))
    for kind in (mujoco.mjtSensor.mjSENS_SUBTREECOM, mujoco.mjtSensor.mjSENS_SUBTREELINVEL):
        spec.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_BODY, objname="torso")
    return spec.compile()


def pair(body: str, nsim: int = 5):
    compiled = model(body)
    return batch.Batch(compiled, nsim, 2), SerialBatch(compiled, nsim, 2)


def same(native, serial) -> None:
    for name in FIELDS:
        assert np.array_equal(native.bind(name), serial.bind(name)), name
    assert np.array_equal(native.warning, serial.warning)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("body", ["ant", "hopper"])
def test_states_and_derived_fields_equal_the_native_batch(body, stage):
    native, serial = pair(body)
    both = (native, serial)
    rng = np.random.default_rng(stage)
    derived = {name: [b.bind(name) for b in both] for name in ("xpos", "sensordata", "cvel")}
    same(*both)
    start = 0.05 * rng.standard_normal((5, native.model.nv))
    for b in both:
        b.reset(stage=0)
        b.bind("qvel")[...] = start
        b.forward()
    for t in range(12):
        control = rng.uniform(-1.0, 1.0, (5, native.model.nu))
        ids = None if t % 3 else np.array([0, 2, 3])
        for b in both:
            b.bind("ctrl")[...] = control
            b.step(ids, nstep=3, stage=stage)
        same(*both)
        shown = {STAGES[0]: ("xpos", "sensordata"), STAGES[1]: ("xpos",)}
        for name in shown.get(stage, tuple(derived)):
            assert np.array_equal(*derived[name]), name
        if t == 6:
            for b in both:
                b.reset(np.array([1, 3]), stage=0)
                b.forward(np.array([1, 3]))
            same(*both)
    for b in both:
        b.reset()
    same(*both)


def test_a_divergence_is_counted_as_by_the_native_batch():
    native, serial = pair("hopper", 3)
    for b in (native, serial):
        b.reset()
        b.bind("qvel")[1] = 1e12
        b.step(nstep=4)
    same(native, serial)
    assert (native.warning[:, :, 1].sum(axis=1) > 0).tolist() == [False, True, False]
    for b in (native, serial):
        b.reset()
        b.step()
    same(native, serial)


def test_fields_of_the_model_differ_between_simulations():
    native, serial = pair("hopper", 4)
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 2.0, 4)
    untouched = native.model.body_mass.copy()
    for b in (native, serial):
        b.expand("body_mass")[...] *= scale[:, None]
        b.expand("opt.gravity")[:, 2] *= scale
        b.expand("dof_invweight0")
        b.set_const()
        b.reset()
    same(native, serial)
    assert np.array_equal(native.expand("dof_invweight0"), serial.expand("dof_invweight0"))
    for _ in range(10):
        control = rng.uniform(-1.0, 1.0, (4, native.model.nu))
        for b in (native, serial):
            b.bind("ctrl")[...] = control
            b.step(nstep=4)
    same(native, serial)
    assert np.array_equal(native.expanded("body_mass"), serial.expanded("body_mass"))
    assert serial.expanded("geom_size") is None
    assert len(np.unique(serial.bind("qpos")[:, 1])) == 4  # and the fields made a difference
    assert np.array_equal(serial.model.body_mass, untouched)
    given = copy.copy(serial.model)
    for own in (serial.get_model(2), serial.get_model(2, given), given):
        for field in ("body_mass", "body_subtreemass", "dof_invweight0"):
            assert np.array_equal(getattr(native.get_model(2), field), getattr(own, field))
        assert np.array_equal(native.get_model(2).opt.gravity, own.opt.gravity)
    for data in (serial.get_data(2), serial.get_data(2, mujoco.MjData(serial.model))):
        assert np.array_equal(data.qpos, native.get_data(2).qpos)
    for b in (native, serial):
        with refused("body_mas", "body_mass", error=ValueError):
            b.expand("body_mas")
        with refused("qps", "qpos", error=ValueError):
            b.bind("qps")


def test_contact_forces_from_the_whole_data_of_a_persistent_batch():
    compiled = model("ant")
    both = [kind(compiled, 2, 1, persistent=True) for kind in (batch.Batch, SerialBatch)]
    data, found = mujoco.MjData(compiled), []
    for b in both:
        b.reset()
        for _ in range(30):
            b.bind("ctrl")[1] = 0.5
            b.step(nstep=5)
            for i in range(2):
                whole = b.get_data(i, data)
                mujoco.mj_rnePostConstraint(compiled, whole)
                found.append(whole.cfrc_ext.copy())
    assert np.abs(found[:60]).max() > 1.0
    assert np.array_equal(found[:60], found[60:])


@pytest.mark.parametrize("variant", ["stock", "icml2017"])
def test_a_family_gives_the_same_on_either_batch(monkeypatch, variant):
    def episode() -> list[np.ndarray]:
        family = make_family("half-cheetah-vel", variant=variant)
        vector = family.make_vec(2, 2, autoreset_mode="Disabled")
        vector.set_tasks(family.tasks.grid(2))
        rng = np.random.default_rng(1)
        found = [vector.reset(seed=3)[0]]
        for _ in range(20):
            found += vector.step(rng.uniform(-2.0, 2.0, (4, 6)).astype(np.float32))[:2]
        return found

    native = episode()
    monkeypatch.setattr(mujoco_vector, "Batch", SerialBatch)
    for one, other in zip(native, episode(), strict=True):
        assert np.array_equal(one, other)
