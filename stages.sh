# What speedrun.sh, sweep.sh, path.sh, map.sh and transplant.sh share: `stage` runs a script unless its output is there,
# and one folder holds one study. Sourced with $here, $OUT and $settings set.

mkdir -p "$OUT"
[ -e "$OUT/settings.txt" ] || echo "$settings" > "$OUT/settings.txt"
if [ "$settings" != "$(cat "$OUT/settings.txt")" ]; then
  echo "$OUT holds a study with other settings: $(cat "$OUT/settings.txt")" >&2
  echo "Name another folder, as in OUT=runs/other bash $(basename "$0")" >&2
  exit 1
fi

stage() {  # stage OUTPUT SCRIPT FLAGS...
  local output=$1 script=$2; shift 2
  if [ -e "$output" ]; then echo "== $output is there"; return; fi
  echo "== $script $* --out $output"
  case $script in train_*) set -- "$@" --resume ;; esac  # go on inside a stage that was stopped
  python "$here/$script" "$@" --out "$output"
}

drift_of() {  # how far a run's encoder has moved, from the last line of its log
  tail -n 1 "$1/log.jsonl" | grep -o '"drift_vision": [^,}]*' | cut -d ' ' -f 2
}
