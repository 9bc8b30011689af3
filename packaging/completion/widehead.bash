# Completion for bash. What is offered is what the installed program lists.
_widehead() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} verb=${COMP_WORDS[1]} words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="$(widehead --help | sed -n '/^Subcommands:/,$s/^  \([a-z]*\) .*/\1/p') --help --version"
  elif [[ $word == -* ]]; then
    words=$(widehead "$verb" --help | grep -o -e '^  \(-h,\)\?--[a-z0-9-]*' | sed 's/.*--/--/')
  else
    case "$verb $before" in
      *' --model') words=$(widehead list models | awk 'NR > 1 { print $1 }' | sort -u) ;;
      *' --kernel' | *' --against') words=$(widehead list kernels | awk 'NR > 1 { print $1 }') ;;
      'bench bench') words=$(widehead list suites | awk 'NR > 1 { print $1 }') ;;
      'list list') words='kernels models suites devices' ;;
    esac
  fi
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
  [ "${#COMPREPLY[@]}" -gt 0 ] || compopt -o default
}
complete -F _widehead widehead
