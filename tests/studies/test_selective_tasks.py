"""The two synthetic tasks of selective attention: what is drawn, what is learned, what bounds it."""

import numpy as np
import pytest
import torch

from reattend.studies.selective_tasks import (
    DENOISE_ARMS,
    Denoising,
    at_first,
    bounds_of_denoising,
    degree_slope,
    denoise,
    denoise_weights,
    distance,
    divergence,
    draw_graphs,
    graph_queries,
    graph_rows,
    graph_tau,
    graph_weights,
    learn_denoising,
    learn_graphs,
    posterior_mean,
    squared_error,
)

GRAPH_ARMS = ("vanilla", "SSA", "shared", "permuted", "second W", "constant", "network query")


def graphs(seeds=(0, 1, 2), nodes=9, width=5, degrees=(1, 2, 4)):
    return draw_graphs(seeds, nodes, width, degrees)


# --- next tokens on a graph ----------------------------------------------------------------------


def test_nodes_have_the_successors_that_were_asked_for():
    found = graphs()
    assert found.degrees.tolist() == [1, 2, 4] * 3
    assert (found.target > 0).sum(-1).tolist() == [[1, 2, 4] * 3] * 3
    torch.testing.assert_close(found.target.sum(-1), torch.ones(3, 9))
    assert not found.target.diagonal(dim1=1, dim2=2).any()
    assert found.entropy == pytest.approx(np.log([1, 2, 4]).mean())
    torch.testing.assert_close(found.embeddings.norm(dim=-1), torch.ones(3, 9))
    with pytest.raises(ValueError, match="9 successors of one node among 9"):
        draw_graphs((0,), 9, 5, (9,))


def test_a_seed_is_the_same_whatever_its_company():
    alone, together = graphs((1,)), graphs((0, 1, 2))
    assert torch.equal(alone.target[0], together.target[1])
    assert torch.equal(alone.embeddings[0], together.embeddings[1])
    for arm in ("SSA", "vanilla", "second W"):
        one = learn_graphs(arm, alone, steps=20, rate=0.1)
        three = learn_graphs(arm, together, steps=20, rate=0.1)
        np.testing.assert_allclose(one.final[0], three.final[1], rtol=1e-4)


@pytest.mark.parametrize("arm", GRAPH_ARMS)
def test_arms_start_without_a_temperature_and_attend_to_nodes(arm):
    drawn = graphs()
    weights = graph_weights(arm, drawn, hidden=7)
    torch.testing.assert_close(graph_tau(arm, weights, drawn), torch.ones(3, 9, 1))
    rows = graph_rows(arm, weights, drawn)
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(3, 9))
    if arm in ("vanilla", "SSA"):
        e = drawn.embeddings
        scores = torch.einsum("snd,sde,sme->snm", e, weights["W"], e)
        torch.testing.assert_close(rows, scores.log_softmax(-1))


def test_a_temperature_multiplies_the_row_of_its_node():
    drawn = graphs()
    weights = graph_weights("SSA", drawn, hidden=7)
    torch.nn.init.normal_(weights["direction"])
    tau = graph_tau("SSA", weights, drawn)
    assert (tau > 0).all()
    assert (tau < 2).all()
    assert tau.std() > 0.1
    scores = graph_queries("SSA", weights, drawn) @ drawn.embeddings.mT
    expected = torch.stack([tau[:, i] * scores[:, i] for i in range(9)], 1).log_softmax(-1)
    torch.testing.assert_close(graph_rows("SSA", weights, drawn), expected)


def test_the_placebo_deals_the_same_temperatures_to_random_nodes():
    drawn = graphs()
    weights = graph_weights("permuted", drawn, hidden=7)
    torch.nn.init.normal_(weights["direction"])
    own = graph_tau("permuted", weights, drawn)
    generator = torch.Generator().manual_seed(0)
    first, second = (graph_tau("permuted", weights, drawn, generator) for _ in range(2))
    assert not torch.equal(first, second)
    for dealt in (first, second):
        torch.testing.assert_close(dealt.sort(1).values, own.sort(1).values)


def test_divergence_and_distance_of_known_rows():
    target = torch.tensor([0.5, 0.5, 0.0]).expand(1, 3, 3)
    rows = torch.tensor([0.25, 0.5, 0.25]).log().expand(1, 3, 3)
    assert divergence(rows, target).item() == pytest.approx(0.5 * np.log(2))
    assert distance(rows, target).item() == pytest.approx(0.5)
    sure = torch.tensor([0.5, 0.5, 1e-30]).log().expand(1, 3, 3)
    assert divergence(sure, target).item() == pytest.approx(0)


@pytest.mark.parametrize("arm", GRAPH_ARMS)
def test_training_lowers_the_divergence(arm):
    run = learn_graphs(arm, graphs(), steps=200, rate=0.02)
    assert (run.final < 0.9 * run.divergence[0]).all()
    assert run.divergence.shape == run.norm.shape == (200, 3)
    assert (run.final_distance > 0).all()
    assert (run.final_distance < 2).all()
    if arm != "permuted":  # whose temperatures are drawn again
        np.testing.assert_allclose(run.final, run.divergence[-1], rtol=0.02)


def test_with_room_for_every_node_the_graph_is_solved():
    run = learn_graphs("vanilla", graphs(width=9), steps=1500, rate=0.05)
    assert run.final.max() < 0.02


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="unknown arm 'other'"):
        learn_graphs("other", graphs(), steps=1, rate=0.1)
    with pytest.raises(ValueError, match="unknown arm 'other'; there are: vanilla, query bias"):
        learn_denoising("other", Denoising(), (0,), 1, 0.1, 2, 2)


def test_values_at_the_first_step_below_a_level():
    curve = np.array([[3.0, 3.0], [2.0, 1.0], [1.0, 2.0]])
    values = np.array([[10.0, 20.0], [11.0, 21.0], [12.0, 22.0]])
    assert at_first(curve, np.array([1.5, 2.5]), values).tolist() == [12, 21]
    with pytest.raises(ValueError, match="1 of the curves never reach the level"):
        at_first(curve, np.array([0.5, 2.5]), values)


def test_the_slope_of_a_power_of_the_degree_is_its_exponent():
    degrees = torch.tensor([1, 2, 4, 8])
    tau = torch.stack([3 * degrees**-0.7, degrees**0.2])[..., None]
    np.testing.assert_allclose(degree_slope(tau, degrees), [-0.7, 0.2], atol=1e-6)
    floored = torch.tensor([1e-3, 0.0, 1e-9, 5e-4])[None, :, None]
    np.testing.assert_allclose(degree_slope(floored, degrees), [0.0], atol=1e-6)


def test_a_network_in_the_query_has_as_many_parameters_as_one_for_a_temperature():
    drawn = graphs(nodes=32, width=12)
    sizes = [
        sum(w[0].numel() for w in graph_weights(arm, drawn, hidden=32).values())
        for arm in ("SSA", "network query")
    ]
    assert sizes[0] == 12**2 + 32 * 14
    assert abs(sizes[1] - sizes[0]) <= 12


# --- denoising -----------------------------------------------------------------------------------


def test_tokens_are_signal_and_noise_as_said():
    task = Denoising(tokens=200, width=3)
    x, mean, signal = task.draw((0, 1), 50, step=0)
    assert x.shape == (2, 50, 200, 4)
    assert signal.float().mean().item() == pytest.approx(0.3, abs=0.01)
    left = (x[..., :-1] - mean[:, :, None])[signal]
    assert left.std().item() == pytest.approx(1.0, abs=0.02)
    assert left.mean().item() == pytest.approx(0.0, abs=0.02)
    assert x[..., :-1][~signal].std().item() == pytest.approx(2.0, abs=0.04)
    marker = x[..., -1]
    assert marker[signal].mean().item() == pytest.approx(1.0, abs=0.01)
    assert marker[~signal].mean().item() == pytest.approx(-1.0, abs=0.01)
    assert marker[signal].std().item() == pytest.approx(0.3, abs=0.01)


def test_sequences_of_a_seed_do_not_depend_on_other_seeds_and_steps_differ():
    task = Denoising(tokens=5, width=2)
    assert torch.equal(task.draw((1,), 3, 4)[0][0], task.draw((0, 1), 3, 4)[0][1])
    assert not torch.equal(task.draw((1,), 3, 4)[0], task.draw((1,), 3, 5)[0])


def test_the_posterior_mean_has_the_least_error_of_its_kind():
    task = Denoising()
    x, mean, signal = task.draw((0, 1), 800, step=0)
    best = squared_error(posterior_mean(x, signal), mean)
    # Given the number m of signal tokens its error is width / (m + 1).
    expected = (16 / (signal.sum(-1) + 1.0)).mean()
    assert best.mean().item() == pytest.approx(expected.item(), rel=0.03)
    for factor in (0.95, 1.05):
        assert (squared_error(factor * posterior_mean(x, signal), mean) > best).all()


def test_bounds_are_in_order():
    found = bounds_of_denoising(Denoising(), (0, 1), 200, 0)
    assert (found["Bayes"] < 0.2 * found["scaled mean"]).all()
    assert (found["scaled mean"] < found["mean of all"]).all()


@pytest.mark.parametrize("arm", DENOISE_ARMS)
def test_layers_start_as_the_mean_of_all(arm):
    task = Denoising()
    x, _, _ = task.draw((0, 1), 6, 0)
    weights = denoise_weights(arm, task, (0, 1), hidden=8)
    answer, weight = denoise(arm, weights, x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 6))
    assert (answer - x[..., :-1].mean(-2)).abs().max() < 0.3


def stirred(arm, task):
    weights = denoise_weights(arm, task, (0, 1), hidden=8)
    torch.manual_seed(0)
    torch.nn.init.normal_(weights["direction"])
    return weights


def test_what_each_temperature_scales():
    task = Denoising(tokens=7, width=3)
    x, _, _ = task.draw((0, 1), 4, 0)
    weights = stirred("value", task)
    plain, even = denoise("vanilla", weights, x)
    features = torch.einsum("sbnc,sch->sbnh", x, weights["widen"]) + weights["bias"][:, None]
    tau = 1 + (torch.nn.functional.gelu(features) @ weights["direction"][:, None]).tanh()[..., 0]
    answer, weight = denoise("value", weights, x)
    torch.testing.assert_close(weight, even * tau)
    torch.testing.assert_close(answer, torch.einsum("sbn,sbnc,scw->sbw", weight, x, weights["V"]))
    scaled, _ = denoise("output", weights, x)
    torch.testing.assert_close(scaled, plain * tau[:, :, :1])
    _, sharp = denoise("query", weights, x)
    torch.testing.assert_close(sharp, (even.log() * tau[:, :, :1]).softmax(-1))
    _, noisy = denoise("noise", weights, x, torch.Generator().manual_seed(0))
    ratio = (noisy / even).sort(-1).values
    torch.testing.assert_close(ratio, tau.sort(-1).values)
    assert not torch.allclose(noisy, weight)


def test_value_temperatures_learn_to_drop_noise():
    run = learn_denoising("value", Denoising(), (0, 1), steps=150, rate=0.03, batch=16, tests=200)
    start = bounds_of_denoising(Denoising(), (0, 1), 200, 150)["mean of all"]
    assert (run.error < 0.5 * start).all()
    task = Denoising()
    x, _, signal = task.draw((0, 1), 50, 10**5)
    _, weight = denoise("value", run.weights, x)
    _, plain = denoise("vanilla", run.weights, x)
    tau = weight / plain
    assert tau[signal].mean() > 3 * tau[~signal].mean()
