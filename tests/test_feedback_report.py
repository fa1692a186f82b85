from cluster.pipeline.feedback_report import one_sided


def test_a_kind_without_both_classes_is_warned_about_with_what_to_do() -> None:
    counts = {
        "object": {"none": 1, "ok": 5, "hallu": 2, "unknown": 0},
        "attribute": {"none": 1, "ok": 5, "hallu": 0, "unknown": 0},
        "relation": {"none": 9, "ok": 0, "hallu": 0, "unknown": 3},
    }
    attribute, relation = one_sided(counts)  # type: ignore[arg-type]
    assert "attribute: 5 segments are labelled OK and 0 HALLU" in attribute
    assert "ppo.shape.weights.relation=0" in relation
