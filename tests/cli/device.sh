#!/bin/sh
# What says where things run and what that takes: doctor, --device, the memory lines. Needs no GPU.
. "$(dirname "$0")/lib.sh"
says() { # says PATTERN: in the last command's stdout
    grep -Eq -e "$1" "$work/stdout" || problem "$name: /$1/ is not in: $(head -c 600 "$work/stdout")"
}

accepts 'doctor' "$sida" doctor --device cpu
for line in '^used +--device cpu is cpu: ' '^model +.* kernels' '^predictor +on the host' \
    '^locked memory ' '^host to device .*GB/s' '^device memory .*GB/s' '^cudnn ' '^(gpu|cublas|cuda) '; do
    says "$line"
done
accepts 'doctor, JSON' "$sida" doctor --device cpu --json
for key in version cuda cublas cudnn problem devices cpu memlock_bytes libraries asked device use forward \
    predictor pinning link pinned_gb_per_s memory_gb_per_s nvml; do
    says "\"$key\":"
done
# auto without a visible GPU is the CPU.
accepts 'doctor, no GPU' env CUDA_VISIBLE_DEVICES= "$sida" doctor
says '^used +--device auto is cpu'
says '^gpu +device cuda: .*use --device cpu'

if [ ! -e "$sample/config.json" ]; then finish; fi
run() {
    name=$1
    shift
    accepts "$name" "$sida" run --model "$sample" --format sst2 --input "$reviews" --limit 6 --device cpu --digest "$@"
}
run 'all resident'
says '^device memory +cpu, [0-9.]+ MiB at peak'
says '^experts +all [0-9]+ resident'
digest=$(sed -n 's/^digest *//p' "$work/stdout")
run 'a size' --budget 14MiB
says '^device memory +cpu, 1[0-4]\.[0-9]+ MiB at peak'
says "^digest +$digest\$"
says ' hits, '
run 'a size, JSON' --budget 14MiB --json
says '"driver_bytes_peak": [0-9]{7,8},'
says '"driver_alone": true'
says '"resident": false'
head -n 3 "$reviews" | cut -f 1 >"$work/in"
accepts 'generate' "$sida" generate --model "$sample" --input "$work/in" --device cpu
grep -q '^device memory: cpu, [0-9.]* MiB at peak' "$work/stderr" || problem "generate: $(cat "$work/stderr")"
accepts 'generate, JSON' "$sida" generate --model "$sample" --input "$work/in" --device cpu --json
says '"driver_bytes_peak": [0-9]+,'

# The CPU's trace does not say so, a GPU's would: where auto is the CPU they are the same.
trace() { # trace FILE OPTION...
    name="trace $*" to=$1
    shift
    accepts "$name" env CUDA_VISIBLE_DEVICES= "$sida" trace --model "$sample" --format sst2 --input "$reviews" --limit 6 --output "$to" "$@"
    says ' on cpu$'
}
trace "$work/a.h5"
trace "$work/b.h5" --device cpu
cmp -s "$work/a.h5" "$work/b.h5" || problem 'trace: --device changed the bytes'
finish
