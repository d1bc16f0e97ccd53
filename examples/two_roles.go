// The authenticator of two_roles.py in Go: a command, or with PGAUTHPROXY_WORKER=1 a worker.
//
//	go build -o two_roles two_roles.go
package main

import (
	"bufio"
	"crypto/md5"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strings"
)

type person struct{ password, role, secret string }

// What the gateway's clients know, and what only the gateway knows.
var people = map[string]person{
	"alice": {"wonderland", "reader", "reader's secret"},
	"bob":   {"builder", "writer", "writer's secret"},
}

// request reads lines up to an empty one or the end of the input, which is an error if nothing stood before it.
func request(input *bufio.Reader) (map[string]string, error) {
	fields := map[string]string{}
	for {
		line, err := input.ReadString('\n')
		line = strings.TrimSuffix(line, "\n")
		if name, value, found := strings.Cut(line, "="); found {
			fields[name] = value
		}
		if err == io.EOF && len(fields) > 0 {
			return fields, nil
		}
		if err != nil || line == "" {
			return fields, err
		}
	}
}

func hexMD5(text string) string {
	sum := md5.Sum([]byte(text))
	return hex.EncodeToString(sum[:])
}

// isKnown says whether the client has answered with its password, in method md5 or cleartext.
func isKnown(fields map[string]string, password string) bool {
	expected := password
	if fields["_SOURCE_METHOD"] == "md5" {
		salt, err := hex.DecodeString(fields["_SOURCE_SALT"])
		if err != nil {
			return false
		}
		expected = "md5" + hexMD5(hexMD5(password+fields["user"])+string(salt))
	}
	return subtle.ConstantTimeCompare([]byte(fields["_SOURCE_CRED"]), []byte(expected)) == 1
}

// answer gives the lines that let the client in, or none.
func answer(fields map[string]string) string {
	user := fields["user"]
	// An unknown user takes the same way, so that nobody learns who exists.
	found, exists := people[user]
	if !isKnown(fields, found.password) || !exists {
		return ""
	}
	host, database := os.Getenv("TARGET_HOST"), fields["database"]
	if host == "" {
		host = "127.0.0.1:5432"
	}
	if database == "" {
		database = user
	}
	return fmt.Sprintf(
		"_META_TARGET_HOST=%s\n_META_TARGET_PASSWORD=%s\nuser=%s\ndatabase=%s\napplication_name=gateway:%s\n",
		host, found.secret, found.role, database, user)
}

func main() {
	input := bufio.NewReader(os.Stdin)
	if os.Getenv("PGAUTHPROXY_WORKER") != "1" {
		fields, err := request(input)
		lines := answer(fields)
		if err != nil || lines == "" {
			os.Exit(1)
		}
		fmt.Print(lines)
		return
	}
	for {
		fields, err := request(input)
		if err != nil {
			return
		}
		// An empty answer refuses. One write, so that nothing of it waits in a buffer.
		fmt.Print(answer(fields) + "\n")
	}
}
