#!/bin/sh
# The authenticator of two_roles.py as a shell script. Needs md5sum and nothing else.
while IFS= read -r line; do
    case $line in
        user=*) user=${line#user=} ;;
        database=*) database=${line#database=} ;;
        _SOURCE_CRED=*) answer=${line#_SOURCE_CRED=} ;;
        _SOURCE_SALT=*) salt=${line#_SOURCE_SALT=} ;;
    esac
done

case $user in
    alice) password=wonderland role=reader secret="reader's secret" ;;
    bob) password=builder role=writer secret="writer's secret" ;;
    *) exit 1 ;;
esac

# The salt is four bytes, given as eight hex digits: printf writes them by their octal numbers.
octal=$(printf '%s' "$salt" | sed 's/../0x& /g; s/ $//')
octal=$(printf '\\%03o' $octal)
stored=$(printf '%s' "$password$user" | md5sum | cut -c1-32)
expected=md5$(printf "%s$octal" "$stored" | md5sum | cut -c1-32)
[ "$answer" = "$expected" ] || exit 1

echo "_META_TARGET_HOST=${TARGET_HOST:-127.0.0.1:5432}"
echo "_META_TARGET_PASSWORD=$secret"
echo "user=$role"
echo "database=${database:-$user}"
echo "application_name=gateway:$user"
