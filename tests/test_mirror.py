"""``tests/<folder>/test_<module>.py`` is about ``attnrobust/<folder>/<module>.py``; what is not is named here."""

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "attnrobust"
FREE = {"soundness", "contracts"}  # products of several modules

CROSS_CUTTING = {
    "test_borders.py",  # tests/plain in a process of its own
    "models/test_models_page.py",  # the page that benchmarks/model_survey.py makes
    "models/networks/test_shared_weights.py",  # of albert, states, block_layout: modules that run several times
    "layers/test_modern_derivatives.py",  # of attention, jacobian, attacks/search and layers/graph/attend
    "test_demo.py",  # the demo's data and page
    "test_device.py",  # the same numbers on another device
    "test_digits.py",  # of tests/digits.py
    "test_docs.py",
    "test_examples.py",
    "test_mirror.py",
    "test_notebooks.py",  # of docs/notebooks
    "test_packaging.py",
    "test_printed_commands.py",  # of README and docs
    "test_shape_checks.py",  # of tests/shape_checks.py
    "test_site.py",  # of mkdocs.yml
    "test_strategies.py",  # of tests/strategies.py
}

# Modules without a file of their own, under the tests that cover them. Whoever writes the file deletes the line.
UNMIRRORED = {
    # tests/models/interface/test_families.py, tests/models/test_listing.py
    "models/biases.py",
    "models/interface/adapter.py",
    "models/interface/looking.py",
    "models/interface/positions.py",
    "models/interface/reading.py",
    "models/own_attention.py",
    "models/unmodelled.py",
    # tests/models/networks/test_shared_weights.py
    "models/networks/albert.py",
    # tests/reproduce/test_registry.py, test_run.py
    "reproduce/experiment.py",
    "reproduce/experiments/castin2023_splitting.py",
    "reproduce/experiments/castin2024_growth.py",
    "reproduce/experiments/castin2024_masked.py",
    "reproduce/experiments/castin2024_meanfield.py",
    "reproduce/experiments/kim2021_invertible.py",
    "reproduce/experiments/kim2021_language.py",
    "reproduce/experiments/kim2021_lipschitz.py",
    "reproduce/experiments/trained_radii.py",
    "reproduce/experiments/vuckovic2020.py",
    "reproduce/growth.py",
    "reproduce/store.py",
    "reproduce/tables.py",
    "reproduce/texts.py",
    # test_attacks.py and test_driver.py of the same folder
    "attacks/foolbox/carrier.py",
    "attacks/foolbox/distances.py",
    "attacks/foolbox/library.py",
    "attacks/foolbox/names.py",
    "attacks/foolbox/search.py",
    # tests/attacks/test_mass_splitting.py, tests/contracts/test_attacks.py
    "attacks/measures/expand.py",
    "attacks/measures/goal.py",
    "attacks/measures/split_starts.py",
    "attacks/measures/splits.py",
    # tests/contracts/test_attacks.py, tests/attacks/test_token_moving.py
    "attacks/method.py",
    "attacks/registry.py",
    "attacks/token_radii.py",
    "attacks/verification.py",
    # test_evaluate.py, tests/attacks/test_token_moving.py, tests/soundness/test_last_bit.py
    "attacks/search/directions.py",
    "attacks/search/geometry.py",
    "attacks/search/projected_gradient.py",
    "attacks/search/pullback.py",
    # test_prepared_network.py of the same folder, tests/attacks/test_token_moving.py
    "attacks/search/graph_input.py",
    "attacks/search/memory.py",
    "attacks/search/stacked_goal.py",
    # tests/soundness/test_closed_forms.py, tests/lipschitz/test_table.py
    "certify/closed_form/claims.py",
    "certify/closed_form/havens2024_local.py",
    "certify/closed_form/spread_lipschitz.py",
    # test_method.py of the same folder: facts at true points
    "certify/conic/margin_program.py",
    "certify/conic/relaxation.py",
    "certify/conic/row.py",
    "certify/conic/solver.py",
    # test_method.py of the same folder
    "certify/displacement/bound.py",
    "certify/displacement/trial.py",
    "certify/displacement/pair_rows.py",  # tests/certify/shared/test_pair_forms.py
    # test_proof.py and test_descent.py of the same folder
    "certify/margin/all_tokens/choice.py",
    "certify/margin/all_tokens/functional.py",
    "certify/margin/all_tokens/search.py",
    # test_method.py of the same folder
    "certify/margin/one_token/descent.py",
    "certify/margin/one_token/functional.py",
    "certify/margin/one_token/rows.py",
    # tests/soundness/test_measures.py
    "certify/measures/ball.py",
    "certify/measures/local.py",
    # tests/contracts/test_certificates.py
    "certify/method.py",
    "certify/registry.py",
    # test_sphere.py and test_scales.py of the same folder
    "certify/pre_norm/own_moves.py",
    "certify/pre_norm/question.py",
    # tests/certify/network/node_bounds/test_registry.py
    "certify/network/node_bounds/affine.py",
    "certify/network/node_bounds/attend.py",
    "certify/network/node_bounds/attend_remainder.py",
    "certify/network/node_bounds/elementwise.py",
    "certify/network/node_bounds/node_bound.py",
    "certify/network/node_bounds/rows.py",
    # tests/certify/network/test_chain.py
    "certify/network/clean_tails.py",
    "certify/network/passes.py",
    "certify/network/product.py",
    "certify/network/propagation.py",
    # test_method.py, test_recursion.py, test_second_order.py and nodes/test_registry.py of the same folder
    "certify/network/composite/bound.py",
    "certify/network/composite/branches.py",
    "certify/network/composite/cost.py",
    "certify/network/composite/margin.py",
    "certify/network/composite/metrics.py",
    "certify/network/composite/nodes/activation_bounds.py",
    "certify/network/composite/nodes/attend.py",
    "certify/network/composite/nodes/attend_terms.py",
    "certify/network/composite/nodes/base.py",
    "certify/network/composite/nodes/elementwise.py",
    "certify/network/composite/nodes/normalise.py",
    "certify/network/composite/preparation.py",
    "certify/network/composite/sketch.py",
    "certify/network/composite/targets.py",
    "certify/network/composite/third_order.py",
    "certify/network/composite/top_eigenvalue.py",
    # the lemmas of the displacement and margin certificates
    "certify/shared/change.py",
    "certify/shared/constants.py",
    "certify/shared/first_order.py",
    "certify/shared/head_sizes.py",
    "certify/shared/reach.py",
    "certify/shared/softmax_rows.py",
    # tests/cli/test_compare.py, test_output.py; tests/runs/test_bench.py, test_scan.py
    "cli/app.py",
    "cli/bench.py",
    "cli/exits.py",
    "cli/interrupt.py",
    "cli/scan.py",
    # test_export.py and test_translate.py of the same folder
    "interchange/activations.py",
    "interchange/attention.py",
    "interchange/onnx_file.py",
    "interchange/program.py",
    "interchange/vnnlib.py",
    # tests/contracts/test_layers.py, tests/layers/test_attention.py
    "layers/features.py",
    "layers/masks.py",
    "layers/token_map.py",
    # test_node.py, test_linearisation.py, test_network_graph.py of the same folder
    "layers/graph/activation_functions.py",
    "layers/graph/affine.py",
    "layers/graph/attend.py",
    "layers/graph/blocks.py",
    "layers/graph/elementwise.py",
    "layers/graph/normalise.py",
    "layers/graph/rows.py",
    "layers/graph/sweeps.py",
    "layers/graph/wiring.py",
    # test_table.py, test_fixed_point.py and test_search.py of the same folder
    "lipschitz/contraction.py",
    "lipschitz/derivative.py",
    "lipschitz/derivative_map.py",
    "lipschitz/invertible.py",
    "lipschitz/lower_bounds.py",
    "lipschitz/question.py",
    "lipschitz/records.py",
    "lipschitz/starts.py",
    "lipschitz/upper_bounds.py",
    # test_model.py, test_from_*.py and test_capture.py of the same folder
    "models/adapters.py",
    "models/checks/agreement.py",
    "models/anchors.py",
    "models/arrays.py",
    "models/checks/call_sites.py",
    "models/checks/checkpoint.py",
    "models/checks/forward_inputs.py",
    "models/normalisation.py",
    "models/pictures.py",  # tests/runs/test_sources.py
    "models/pretrained.py",
    # test_check.py and test_reading.py of the same folder
    "models/networks/bert.py",
    "models/networks/block_layout.py",
    "models/networks/distilbert.py",
    "models/networks/gpt2.py",
    "models/networks/heads.py",
    "models/networks/parts.py",
    "models/networks/pieces.py",
    "models/networks/plan.py",
    "models/networks/states.py",
    "models/networks/torch_layers.py",
    "models/networks/vit.py",
    # tests/certify/rigorous/test_local.py (balls), the certificates that use it (triangle)
    "numerics/balls.py",
    "numerics/triangle.py",
    # test_page.py and test_tables.py of the same folder
    "reports/data.py",
    "reports/layout.py",
    "reports/plots.py",
    # test_run.py, test_files.py, test_rows.py and test_scan.py of the same folder
    "runs/storage/atomic.py",
    "runs/evaluate.py",
    "runs/storage/export.py",
    "runs/heat.py",
    "runs/inputs.py",
    "runs/storage/parquet.py",
    "runs/plan.py",
    "runs/reading.py",
    "runs/yardsticks.py",  # tests/reports/test_units.py
    "runs/storage/store.py",
    # test_processes.py of the same folder
    "runs/engines/here.py",
    "runs/engines/schedule.py",
    # tests/test_evaluation.py
    "runs/given.py",
    # tests/reports/test_curve.py
    "cli/curve.py",
    # tests/cli/test_smooth.py
    "reports/smoothed.py",
    "runs/smoothed.py",
    # test_smooth.py of the same folder
    "smoothing/record.py",
    "smoothing/search.py",
    "smoothing/votes.py",
    # the results and messages that hold them
    "status.py",
    "text.py",
    # tests/contracts/test_threats.py, test_moves.py of the same folder
    "threats/base.py",
    "threats/copies.py",
    "threats/parse.py",
    # tests/plain/token_subset_cases.py
    "threats/token_subset.py",
}


def modules() -> set[str]:
    """Every module of the package by its path, packages and the entry point aside."""
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__"))
    return {path.as_posix() for path in paths}


def mirrors() -> set[str]:
    """The module that each test file of a mirrored folder names."""
    paths = (path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))
    named = (path for path in paths if path.parts[0] not in FREE and path.as_posix() not in CROSS_CUTTING)
    return {path.with_name(path.name.removeprefix("test_")).as_posix() for path in named}


def test_every_test_file_is_named_after_a_module() -> None:
    assert mirrors() - modules() == set()


def test_every_module_has_its_test_file_or_is_listed() -> None:
    assert modules() - mirrors() - UNMIRRORED == set(), "write the test file"


def test_the_list_of_modules_without_a_file_only_shrinks() -> None:
    assert UNMIRRORED - modules() == set(), "no such module"
    assert mirrors() & UNMIRRORED == set(), "has its own file now"


def test_cross_cutting_files_exist() -> None:
    assert {name for name in CROSS_CUTTING if not (TESTS / name).exists()} == set()
