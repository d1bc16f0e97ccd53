#!/bin/sh
# The authenticator of two_roles.sh as a worker: it runs on, and answers one request after the other. Each request and
# each answer ends with an empty line; an answer without _META_TARGET_HOST refuses.

answer() {
    case $user in
        alice) password=wonderland role=reader secret="reader's secret" ;;
        bob) password=builder role=writer secret="writer's secret" ;;
        *) return ;;
    esac

    # The salt is four bytes, given as eight hex digits: printf writes them by their octal numbers.
    octal=$(printf '%s' "$salt" | sed 's/../0x& /g; s/ $//')
    octal=$(printf '\\%03o' $octal)
    stored=$(printf '%s' "$password$user" | md5sum | cut -c1-32)
    expected=md5$(printf "%s$octal" "$stored" | md5sum | cut -c1-32)
    [ "$credential" = "$expected" ] || return

    echo "_META_TARGET_HOST=${TARGET_HOST:-127.0.0.1:5432}"
    echo "_META_TARGET_PASSWORD=$secret"
    echo "user=$role"
    echo "database=${database:-$user}"
    echo "application_name=gateway:$user"
}

# Nothing of one request may be left for the next.
forget() {
    user='' database='' credential='' salt=''
}

forget
while IFS= read -r line; do
    case $line in
        user=*) user=${line#user=} ;;
        database=*) database=${line#database=} ;;
        _SOURCE_CRED=*) credential=${line#_SOURCE_CRED=} ;;
        _SOURCE_SALT=*) salt=${line#_SOURCE_SALT=} ;;
        '')
            answer
            echo
            forget
            ;;
    esac
done
