#!/usr/bin/env bash
# Makes what TLS and SuperNode authentication need, in one folder:
#
#   docker/certificates.sh FOLDER --host superlink --host 192.0.2.7 --node client-1 --node client-2
#
# ca.crt, ca.key           the authority; made if it is not there. ca.key signs: keep it off the SuperLink's machine.
# server.crt, server.key   of the SuperLink, for each --host (DNS name or IP address), localhost and 127.0.0.1
# superexec.secret         which the SuperLink and the server app's process share
# NODE, NODE.pub           a SuperNode's key: NODE goes to its machine, NODE.pub to `flwr supernode register`
#
# Later calls add nodes (--node alone) or, once server.* and superexec.secret are moved away, renew the server's. No file
# is ever overwritten. --days: how long the server's certificate holds (365; the authority: ten times as long).
set -euo pipefail

fail() {
  echo "certificates.sh: $*" >&2
  exit 2
}

folder="" days=365 hosts=() nodes=()
while (($#)); do
  case $1 in
    --host | --node | --days)
      (($# > 1)) && [[ $2 != -* ]] || fail "$1 needs a value"
      case $1 in
        --host) hosts+=("$2") ;;
        --node) nodes+=("$2") ;;
        --days) days=$2 ;;
      esac
      shift 2
      ;;
    -*) fail "no such option: $1" ;;
    *)
      [[ -z $folder ]] || fail "one folder, not two: $folder, $1"
      folder=$1
      shift
      ;;
  esac
done
[[ -n $folder ]] || fail "usage: certificates.sh FOLDER [--host HOST]... [--node NAME]... [--days DAYS]"
((${#hosts[@]} + ${#nodes[@]})) || fail "nothing to make: give --host or --node"
[[ $days =~ ^[1-9][0-9]{0,3}$ ]] || fail "--days: a number from 1 to 9999, not $days"
for tool in openssl ssh-keygen; do
  command -v "$tool" >/dev/null || fail "$tool is needed"
done

made=()
subjects="DNS:localhost,IP:127.0.0.1"
for host in ${hosts[@]+"${hosts[@]}"}; do
  [[ $host =~ ^[A-Za-z0-9.:-]+$ ]] || fail "--host: a DNS name or an IP address, not '$host'"
  kind=DNS
  [[ $host =~ ^[0-9.]+$ || $host == *:* ]] && kind=IP
  [[ ,$subjects, == *",$kind:$host,"* ]] || subjects+=",$kind:$host"
  made=(server.key server.crt superexec.secret)
done
for node in ${nodes[@]+"${nodes[@]}"}; do
  [[ $node =~ ^[A-Za-z0-9][A-Za-z0-9_-]*$ ]] || fail "--node: letters, digits, '-' and '_', not '$node'"
  [[ " ${made[*]} " != *" $node "* ]] || fail "--node $node: twice"
  made+=("$node" "$node.pub")
done
for name in "${made[@]}"; do
  [[ ! -e $folder/$name ]] || fail "$folder/$name is there already; nothing is overwritten"
done

umask 077
mkdir -p "$folder"
work=$(mktemp -d "$folder/.making-XXXXXX")
trap 'rm -rf "$work"' EXIT

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }

if ((${#hosts[@]})); then
  if [[ ! -e $folder/ca.key && ! -e $folder/ca.crt ]]; then
    key "$work/ca.key"
    openssl req -x509 -new -key "$work/ca.key" -sha256 -days $((days * 10)) -subj "/CN=Flower SuperLink authority" \
      -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign \
      -out "$work/ca.crt"
    chmod 644 "$work/ca.crt"
    mv -n "$work/ca.key" "$work/ca.crt" "$folder"
  fi
  [[ -e $folder/ca.key && -e $folder/ca.crt ]] || fail "$folder: ca.key and ca.crt belong together, and one is missing"
  key "$work/server.key"
  openssl req -new -key "$work/server.key" -subj "/CN=Flower SuperLink" -out "$work/request"
  printf '%s\n' "subjectAltName=$subjects" basicConstraints=critical,CA:FALSE keyUsage=critical,digitalSignature \
    extendedKeyUsage=serverAuth subjectKeyIdentifier=hash authorityKeyIdentifier=keyid >"$work/extensions"
  openssl x509 -req -in "$work/request" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -days "$days" -sha256 \
    -set_serial "0x$(openssl rand -hex 16 | sed 's/^./4/')" -extfile "$work/extensions" -out "$work/server.crt" \
    2>"$work/said" || fail "$(cat "$work/said")"
  chmod 644 "$work/server.crt"
  openssl rand -hex 32 >"$work/superexec.secret"
fi
for node in ${nodes[@]+"${nodes[@]}"}; do
  ssh-keygen -q -t ecdsa -b 384 -N "" -C "$node" -f "$work/$node"
  chmod 644 "$work/$node.pub"
done
for name in "${made[@]}"; do
  mv -n "$work/$name" "$folder/$name"
done
echo "$folder: ${made[*]}"
