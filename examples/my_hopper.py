"""A MuJoCo body whose tasks change the model: stock hoppers of other masses."""

from metarl.envs import MujocoFamily, Uniform, check_task_family


def scale_masses(model, tasks):  # tasks [n, task_dim] -> fields of MjModel, [n, ...]
    return {"body_mass": tasks[:, :1] * model.body_mass}


heavy_hopper = MujocoFamily(
    name="heavy-hopper",
    env="Hopper-v5",
    tasks=Uniform({"mass": (0.5, 2.0)}),
    model_fields=scale_masses,
    horizon=200,
)

if __name__ == "__main__":
    print(check_task_family(heavy_hopper) or "no faults found")
