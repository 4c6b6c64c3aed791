"""PyTorch Geometric: graphs. Its layers are used in custom LightningModules, with its own loaders."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.common import QUIET
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class GraphModule(pl.LightningModule):
    """Two convolutions and a linear layer, which classify graphs or nodes."""

    def __init__(self, convolution: str) -> None:
        from torch_geometric import nn

        super().__init__()
        self.save_hyperparameters()
        kind = getattr(nn, convolution)
        self.first, self.second = kind(5, 16), kind(16, 16)
        self.out = torch.nn.Linear(16, 2)

    def embed(self, graph: Any) -> Tensor:
        """Return a vector for each node."""
        hidden: Tensor = self.second(self.first(graph.x, graph.edge_index).relu(), graph.edge_index)
        return hidden

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 0.01)


class GraphClassifier(GraphModule):
    """Classifies graphs."""

    def training_step(self, graphs: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch of graphs."""
        from torch_geometric.nn import global_mean_pool

        pooled = global_mean_pool(F.dropout(self.embed(graphs), 0.3, self.training), graphs.batch)
        loss = F.cross_entropy(self.out(pooled), graphs.y)
        self.log("loss", loss, batch_size=graphs.num_graphs)
        return loss


class NodeClassifier(GraphModule):
    """Classifies nodes: those of the training set, or those from which a neighborhood was sampled."""

    def training_step(self, graph: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a graph, or of a sampled part of it."""
        sampled = getattr(graph, "batch_size", None)
        nodes = graph.train_mask if sampled is None else slice(0, sampled)
        return F.cross_entropy(self.out(self.embed(graph))[nodes], graph.y[nodes])


def small_graphs() -> list[Any]:
    """Return 200 graphs of two classes."""
    from torch_geometric.data import Data

    generator, graphs = torch.Generator().manual_seed(0), []
    for i in range(200):
        nodes = 4 + i % 6
        edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
        x = torch.randn(nodes, 5, generator=generator)
        graphs.append(Data(x=x, edge_index=edges, y=torch.tensor([i % 2])))
    return graphs


def large_graph() -> Any:
    """Return a graph with 300 nodes of two classes."""
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(0)
    return Data(
        x=torch.randn(300, 5, generator=generator),
        edge_index=torch.randint(0, 300, (2, 1500), generator=generator),
        y=torch.randint(0, 2, (300,), generator=generator),
        train_mask=torch.rand(300, generator=generator) < 0.5,
    )


def graph_loader() -> Any:
    """Return a loader of batches of graphs."""
    from torch_geometric.loader import DataLoader

    return DataLoader(small_graphs(), batch_size=32, shuffle=True)


def one_graph() -> Any:
    """Return a loader of one graph."""
    from torch_geometric.loader import DataLoader

    return DataLoader([large_graph()], batch_size=1)


def random_parts() -> Any:
    """Return a loader of random parts of a graph."""
    from torch_geometric.loader import RandomNodeLoader

    return RandomNodeLoader(large_graph(), num_parts=4, shuffle=True)


def neighborhoods(*, filter_per_worker: bool) -> Any:
    """Return a loader of nodes with their neighbors.

    Args:
        filter_per_worker: Whether features are gathered in the workers; without it, as is the default for graphs on an
            accelerator, the loader does it after its own iteration.
    """
    from torch_geometric.loader import NodeLoader
    from torch_geometric.sampler import BaseSampler, SamplerOutput

    class InNeighbors(BaseSampler):  # type: ignore[misc]
        """Takes all nodes that have an edge to the given ones; the library's own needs a compiled extension."""

        def __init__(self, edges: Tensor) -> None:
            self.edges = edges

        def sample_from_nodes(self, wanted: Any, **_: Any) -> Any:
            chosen = torch.isin(self.edges[1], wanted.node)
            sources, targets = self.edges[:, chosen]
            others = torch.unique(sources[~torch.isin(sources, wanted.node)])
            nodes = torch.cat([wanted.node, others])
            place = torch.full((int(self.edges.max()) + 1,), -1)
            place[nodes] = torch.arange(len(nodes))
            return SamplerOutput(
                node=nodes,
                row=place[sources],
                col=place[targets],
                edge=chosen.nonzero()[:, 0],
                metadata=(wanted.input_id, None),
            )

        def sample_from_edges(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

        @property
        def edge_permutation(self) -> None:
            return None

    graph = large_graph()
    return NodeLoader(
        graph,
        InNeighbors(graph.edge_index),
        input_nodes=graph.train_mask,
        batch_size=32,
        shuffle=True,
        filter_per_worker=filter_per_worker,
    )


def full_graph_data() -> Any:
    """Return the library's LightningDataModule for one graph."""
    from torch_geometric.data.lightning import LightningNodeData

    return LightningNodeData(large_graph(), loader="full")


def train(kind: type[GraphModule], convolution: str, data: Any, callbacks: list[Any], folder: Path) -> Any:
    """Train a network of the library's convolutions.

    Args:
        kind: The module's class.
        convolution: Class of the convolutions.
        data: Makes the loader, or the LightningDataModule.
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
    """
    seed_everything()
    module = kind(convolution)
    trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, default_root_dir=folder, **QUIET)
    trainer.fit(module, data())
    return module


LIBRARY = Library(
    name="torch-geometric",
    kind="graphs",
    requirements=("torch-geometric==2.8.1",),
    cases=(
        Case("GCNConv, DataLoader", partial(train, GraphClassifier, "GCNConv", graph_loader)),
        Case("GATConv, DataLoader", partial(train, GraphClassifier, "GATConv", graph_loader)),
        Case("GCNConv, one graph", partial(train, NodeClassifier, "GCNConv", one_graph)),
        Case("GCNConv, LightningNodeData", partial(train, NodeClassifier, "GCNConv", full_graph_data)),
        Case("SAGEConv, RandomNodeLoader", partial(train, NodeClassifier, "SAGEConv", random_parts)),
        Case(
            "SAGEConv, NodeLoader",
            partial(train, NodeClassifier, "SAGEConv", partial(neighborhoods, filter_per_worker=True)),
        ),
        Case(
            "SAGEConv, NodeLoader, filter_per_worker=False",
            partial(train, NodeClassifier, "SAGEConv", partial(neighborhoods, filter_per_worker=False)),
        ),
    ),
)
