"""ZeroQ from end to end on a decoder: synthesised latents, sensitivities of its layers, and the front of bits."""

from itertools import pairwise

from support import autoencoders

import attar
from attar.budget.amount import Budget
from attar.budget.choice import Candidate, Layer, choose_bits, totals
from attar.budget.sensitivity import block_sensitivity
from attar.models.block import BlockCall, run_block
from attar.models.linears import Linear, open_linears
from attar.quantize.block_settings import BlockSettings
from attar.quantize.initialize import TransformSettings
from attar.quantize.plan import Rules, plan_layers, weight_bytes
from attar.quantize.wrap import InputFacts

BITS = (2, 4, 8)


def test_synthesised_latents_measure_layers_and_choose_their_bits():
    decoder = autoencoders.trained_decoder().requires_grad_(False)
    data = attar.synthesize(decoder, (4, 8, 8), 8, steps=60, input_statistics=None)
    linears = [Linear(name, form, "other", kept) for name, form, kept in open_linears(decoder, True, {})]
    plans = {
        bits: {p.name: p for p in plan_layers(linears, [], Rules(bits, 16)) if not p.skipped} for bits in BITS
    }
    options = {name: {bits: plans[bits][name] for bits in BITS} for name in plans[8]}
    calls = [BlockCall({"hidden_states": part}) for part in data.split(4)]

    def run(call):
        return run_block(decoder, call, ("hidden_states",))

    targets = [run(call) for call in calls]
    settings = BlockSettings(TransformSettings(scale=False, rotation="none"), weight_clip=False)
    errors = block_sensitivity(decoder, options, InputFacts(), run, calls, targets, settings)
    assert len(errors) == len(linears) > 5
    assert all(error[8] < error[4] < error[2] for error in errors.values())

    layers = []
    for name, plan in plans[8].items():
        found = tuple(Candidate(b, weight_bytes(plans[b][name]), errors[name][b]) for b in BITS)
        weights = plan.in_features * plan.out_features
        layers.append(Layer(name, weights, 2 * weights, found[1], found))
    front = [totals(layers, choose_bits(layers, Budget.parse(f"{mean}bits"))) for mean in (2, 3, 4, 5, 6, 8)]
    assert all(one.error > other.error and one.size < other.size for one, other in pairwise(front))
    uniform = totals(layers, [layer.uniform for layer in layers])
    assert front[2].bits <= 4 + 1e-9 and front[2].error <= uniform.error
