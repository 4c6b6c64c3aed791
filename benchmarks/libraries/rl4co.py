"""RL4CO: reinforcement learning of combinatorial optimization. Each epoch has new data, in batches of TensorDict."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SMALL: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "num_encoder_layers": 1, "feedforward_hidden": 16}
CRITIC: dict[str, Any] = {"embed_dim": 16, "hidden_dim": 16}
DATA: dict[str, Any] = {"batch_size": 16, "train_data_size": 32, "val_data_size": 16, "test_data_size": 16}


def train(algorithm: str, callbacks: list[Any], folder: Path, **options: Any) -> Any:
    """Train a policy to find round trips through six places.

    Args:
        algorithm: "REINFORCE", "POMO" or "PPO".
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
        **options: Options of the algorithm.
    """
    import rl4co.models.zoo as models
    from rl4co.envs import TSPEnv
    from rl4co.models.rl import PPO, REINFORCE
    from rl4co.models.zoo.am import AttentionModelPolicy
    from rl4co.utils.trainer import RL4COTrainer

    seed_everything()
    environment = TSPEnv(generator_params={"num_loc": 6}, seed=0)
    kinds = {"REINFORCE": REINFORCE, "PPO": PPO, "POMO": models.POMO}
    policy = AttentionModelPolicy(env_name="tsp", **SMALL)
    module = kinds[algorithm](environment, policy, **DATA, **options)
    trainer = RL4COTrainer(
        max_epochs=2,
        accelerator="cpu",
        precision="32-true",
        callbacks=callbacks,
        logger=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module)
    return module


def policy_gradient(module: Any, batch: Any) -> Tensor:
    """Return the loss of REINFORCE, whose gradient at the weights that drew the tours is that of PPO's policy."""
    tours = module.policy(module.env.reset(batch), module.env, phase="train")
    advantage = tours["reward"] - tours["reward"].mean()
    loss: Tensor = -(advantage.detach() * tours["log_likelihood"]).mean()
    return loss


LIBRARY = Library(
    name="rl4co",
    kind="reinforcement learning",
    requirements=("rl4co==0.7.0",),
    cases=(
        Case("REINFORCE", partial(train, "REINFORCE", baseline="mean")),
        Case("REINFORCE, rollout baseline", partial(train, "REINFORCE", baseline="rollout")),
        Case("POMO", partial(train, "POMO", num_starts=3, num_augment=8)),
        Case("PPO", partial(train, "PPO", critic_kwargs=CRITIC)),
        Case("PPO, loss_fn=", partial(train, "PPO", critic_kwargs=CRITIC), loss_fn=policy_gradient),
    ),
)
