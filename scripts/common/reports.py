"""The shapes of the reports that the scripts write and read again."""

from scripts.common.shapes import (
    ANYTHING,
    COUNT,
    NOTHING,
    NUMBER,
    POSITIVE,
    TEXT,
    WHOLE,
    Cell,
    Keys,
    List,
    Map,
    Number,
    Text,
)

LAYER = Keys(
    {
        "name": TEXT,
        "kind": TEXT,
        "weights": COUNT,
        "macs": COUNT,
        "weight_bits": Number(low=0, whole=True, none=True),
        "activation_bits": List(COUNT),
        "note": TEXT,
    }
)
PHASES = Keys(optional={"tuples_per_step": List(COUNT)}, rest=Keys(optional={"seconds": POSITIVE}))
CALIBRATION = Keys(  # report.json of calibrate.py
    {
        "name": TEXT,
        "method": TEXT,
        "weight_bits": COUNT,
        "activation_bits": COUNT,
        "size_mb": POSITIVE,
        "float32_mb": POSITIVE,
        "seconds": POSITIVE,
    },
    {
        "ratio_to_float32": NUMBER,
        "weights_quantized": NUMBER,
        "macs_quantized": NUMBER,
        "seed": WHOLE,
        "threads": COUNT,
        "versions": Map(TEXT),
        "sources": Map(TEXT),
        "identity": TEXT,
        "phases": PHASES,
        "layers": List(LAYER),
    },
)
IMAGES = Keys(  # NAME.report.json of sample_diffusion.py
    {"images_per_second": Number(low=1e-30, none=True)},
    {
        "images": Keys(optional={"made": COUNT}),
        "seconds": Keys(optional={"sample": POSITIVE}),
        "versions": Map(TEXT),
    },
)
IDENTITY = Keys(optional={"files_sha256": Map(TEXT)})  # NAME.identity.json
COMPARISON = Keys(optional={"rows": List(Map(Cell()))})  # of compare.py
RECORD = Map(Keys({"settings": Map(ANYTHING), "values": Map(ANYTHING)}))  # of bench/record.py
STATES = Keys(  # what report.py measured: sections of its record
    {
        "timesteps": List(COUNT),
        "trajectories": COUNT,
        "eps_mse_of_steps": List(POSITIVE, none=True),
        "low": List(List(Number(none=True))),
        "high": List(List(Number(none=True))),
    }
)
LAYERS = Keys({"timesteps": List(COUNT), "eps_mse": Map(POSITIVE), "eps_mse_of_all": POSITIVE})
SCORES = Keys(
    {
        "reference": TEXT,
        "images": Keys({"generated": COUNT, "reference": Number(low=0, whole=True, none=True)}),
    },
    {name: Number(none=True) for name in ("fid", "sfid", "is", "precision", "recall")}
    | {"reference_sha256": TEXT},
    none=True,
)
SAMPLER = Keys({"name": TEXT, "steps": COUNT}, rest=NOTHING)
ROW = Keys(  # of benchmark.py's results.json
    {
        "cell": Keys(
            {
                "table": TEXT,
                "label": TEXT,
                "bits": List(COUNT, length=2),
                "steps": COUNT,
                "seed": WHOLE,
                "overrides": List(TEXT),
            },
            rest=NOTHING,
        ),
        "sampler": SAMPLER,
        "calibrated": SAMPLER,
        "scores": SCORES,
        "digest": TEXT,
        "count": COUNT,
        "trajectories": COUNT,
        "calls": COUNT,
        "distinct_calls": COUNT,
    },
    {
        "size_mb": Number(low=0, none=True),
        "seconds": Number(low=0, none=True),
        "code": Text(none=True),
        "backend": Text(none=True),
        "image_mse": List(POSITIVE, none=True),
        "eps_mse_of_trajectories": List(POSITIVE, none=True),
    },
)
PLACE = Keys(optional={name: Text(none=True) for name in ("commit", "cuda", "processor")})
RESULTS = Keys({"name": TEXT, "rows": List(ROW)}, {"environment": PLACE})
