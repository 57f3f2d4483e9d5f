#!/usr/bin/env bash
# The token stores of a config through Apache Beam (pip install 't5x-lite[beam]'), for a
# corpus beyond one machine; bit for bit those that one machine builds:
#
#   launch/beam.sh --config=configs/demo.py --beam=/shared/parts
#   RUNNER=DataflowRunner launch/beam.sh --config=configs/t5_1_1_base.py \
#     --beam=gs://bucket/parts -- --project=p --region=r --temp_location=gs://bucket/tmp \
#     --sdk_container_image=IMAGE_WITH_THIS_PACKAGE
#   RUNNER=FlinkRunner launch/beam.sh ... -- --flink_master=host:8081 \
#     --environment_type=DOCKER --environment_config=IMAGE_WITH_THIS_PACKAGE
#   RUNNER=SparkRunner launch/beam.sh ... -- --spark_master_url=spark://host:7077 \
#     --environment_type=DOCKER --environment_config=IMAGE_WITH_THIS_PACKAGE
#
# Without RUNNER it runs on the cores of this machine. What follows -- are Beam's flags.
# The files of the source and --beam must have the same names here and on the workers;
# this machine puts the parts together in config.data.cache_dir. PYTHON=... is the
# interpreter.
set -euo pipefail

own=()
while (($#)) && [[ $1 != -- ]]; do
  own+=("$1")
  shift
done
if (($#)); then shift; fi

runner=(--runner="${RUNNER:-DirectRunner}")
if [[ -z ${RUNNER:-} ]]; then
  runner+=(--direct_running_mode=multi_processing --direct_num_workers=0)
fi

exec "${PYTHON:-python3}" -m t5x_lite.tokenize "${own[@]}" -- "${runner[@]}" "$@"
