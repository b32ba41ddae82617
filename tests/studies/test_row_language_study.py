"""Training and scoring on the row language."""

import torch
from torch import nn
from torch.nn import functional as F

from reattend.data.row_language import RowLanguage
from reattend.studies.row_language import learn_rows, nats_by_position, second_half
from reattend.training.loop import TrainingPlan, decay_matrices
from reattend.trunks.language import Trunk
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

LANGUAGE = RowLanguage(8, 24)


def small(seed=0):
    torch.manual_seed(seed)
    return Trunk(8, 16, [lambda w: TokenShift(SoftmaxAttention(w, 2), w, learned=False)])


def test_nats_are_the_cross_entropy_of_each_next_token():
    model, tokens = small().eval(), LANGUAGE.draw(5, 1)
    found = nats_by_position(model, tokens, batch=2)
    logp = F.log_softmax(model(tokens)[:, :-1], -1)
    expected = -logp.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second_half(found), found[:, 12:].mean(1))


def test_a_model_learns_and_repeats_itself():
    plan = TrainingPlan(30, 1e-2, warmup=3)
    models = [small(), small()]
    logs = [learn_rows(m, LANGUAGE, plan, 8, seed=2, groups=decay_matrices) for m in models]
    assert logs[0].losses == logs[1].losses
    assert logs[0].losses[-1] < logs[0].losses[0] - 0.05


def test_a_model_that_mixes_nothing_learns_nothing():
    class Nothing(nn.Module):
        def forward(self, x):
            return 0 * x

    torch.manual_seed(0)
    model = Trunk(8, 16, [lambda w: Nothing()])
    learn_rows(model, LANGUAGE, TrainingPlan(30, 1e-2, warmup=3), 8, seed=2)
    nats = second_half(nats_by_position(model, LANGUAGE.draw(64, 9))).mean()
    torch.testing.assert_close(nats, torch.tensor(8.0).log(), atol=0.05, rtol=0)
