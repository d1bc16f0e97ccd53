#!/usr/bin/env node
// The authenticator of two_roles.py for Node: a command, or with PGAUTHPROXY_WORKER=1 a worker.

import { createHash, timingSafeEqual } from "node:crypto";

// What the gateway's clients know, and what only the gateway knows.
const people = new Map([
  ["alice", { password: "wonderland", role: "reader", secret: "reader's secret" }],
  ["bob", { password: "builder", role: "writer", secret: "writer's secret" }],
]);

const md5 = (...parts) => {
  const hash = createHash("md5");
  for (const part of parts) hash.update(part);
  return hash.digest("hex");
};

const areEqual = (one, other) =>
  // Digests are of one length, which timingSafeEqual wants.
  timingSafeEqual(createHash("sha256").update(one, "latin1").digest(), createHash("sha256").update(other, "latin1").digest());

/** Whether the client has answered with its password, in method md5 or cleartext. */
function isKnown(fields, password) {
  if (fields.get("_SOURCE_METHOD") !== "md5") return areEqual(fields.get("_SOURCE_CRED") ?? "", password);
  const stored = md5(password, Buffer.from(fields.get("user"), "latin1"));
  return areEqual(fields.get("_SOURCE_CRED"), "md5" + md5(stored, Buffer.from(fields.get("_SOURCE_SALT"), "hex")));
}

/** The lines that let the client in, or none. */
function answer(request) {
  const fields = new Map(
    request
      .split("\n")
      .filter((line) => line.includes("="))
      .map((line) => [line.slice(0, line.indexOf("=")), line.slice(line.indexOf("=") + 1)]),
  );
  const user = fields.get("user");
  // An unknown user takes the same way, so that nobody learns who exists.
  const person = people.get(user);
  if (!isKnown(fields, person?.password ?? "") || !person) return "";
  return (
    `_META_TARGET_HOST=${process.env.TARGET_HOST ?? "127.0.0.1:5432"}\n` +
    `_META_TARGET_PASSWORD=${person.secret}\n` +
    `user=${person.role}\n` +
    `database=${fields.get("database") || user}\n` +
    `application_name=gateway:${user}\n`
  );
}

// One character for each byte: whatever the client's encoding, nothing is lost.
process.stdin.setEncoding("latin1");
const write = (text) => process.stdout.write(text, "latin1");
let input = "";

if (process.env.PGAUTHPROXY_WORKER === "1") {
  for await (const chunk of process.stdin) {
    input += chunk;
    // A request ends with an empty line, and so does an answer. An empty answer refuses.
    for (let end; (end = input.indexOf("\n\n")) >= 0; input = input.slice(end + 2)) {
      write(answer(input.slice(0, end)) + "\n");
    }
  }
} else {
  for await (const chunk of process.stdin) input += chunk;
  const lines = answer(input);
  if (lines) write(lines);
  else process.exitCode = 1;
}
