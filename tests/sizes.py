"""What triplets of the small pretrained model cost, for tests of budgets in parameters."""

MATRICES = 35
"""5 layers of q, k, v, o, gate, up, down."""
_SIDES = {"q_proj": 64 + 64, "k_proj": 64 + 32, "v_proj": 64 + 32, "o_proj": 64 + 64} | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), 64 + 172
)
LARGEST = 64 + 172 + 1
ONE_OF_EACH = 5 * sum(sides + 1 for sides in _SIDES.values())
"""Parameters of one triplet of every matrix."""


def parameters_of(ranks):
    """Return the parameters of an adapter from module → number of triplets."""
    return sum(rank * (_SIDES[module.rpartition(".")[2]] + 1) for module, rank in ranks.items())


def assert_budget_spent(budget):
    """See that a run.json says that its budget, in parameters, is spent to one percent, and not more of it."""
    assert budget["unit"] == "params" and 0.99 * budget["allowed"] < budget["spent"] <= budget["allowed"]


def assert_spent(ranks, target_r):
    """See that the budget of target_r is spent to one triplet, and not more of it."""
    assert target_r * ONE_OF_EACH - LARGEST < parameters_of(ranks) <= target_r * ONE_OF_EACH
