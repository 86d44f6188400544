//! Commands against a fake server: lists, errors, operations, files.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use std::process::Stdio;

use common::{Fake, PATIENCE, karst, nowhere, signal, texts};
use rustix::process::Signal;
use serde_json::json;

#[tokio::test]
async fn list_is_one_request_in_all_formats() {
    let fake = Fake::start().await;
    for format in ["table", "compact", "csv", "json", "yaml"] {
        let (out, err, code) = texts(&fake.run(&["list", "--format", format]).await);
        assert_eq!((err.as_str(), code), ("", 0));
        insta::assert_snapshot!(format!("list_{format}"), out);
    }
    assert_eq!(fake.requests(), vec!["GET /1.0/instances?recursion=2"; 5]);
}

#[tokio::test]
async fn list_without_state_asks_for_less() {
    let fake = Fake::start().await;
    let (out, _, _) =
        texts(&fake.run(&["list", "-c", "n", "-f", "csv", "--project", "p", "type=container"]).await);
    assert_eq!(out, "c1\n");
    assert_eq!(fake.requests(), ["GET /1.0/instances?recursion=1&project=p"]);
}

#[tokio::test]
async fn errors_are_one_line_with_exit_code() {
    let fake = Fake::start().await;
    let (out, err, code) = texts(&fake.run(&["info", "nope"]).await);
    assert_eq!((out.as_str(), code), ("", 1));
    assert_eq!(
        err,
        "karst: instance \"nope\" not found in project \"default\" (karst list shows what is there)\n"
    );
    let (_, err, _) = texts(&fake.run(&["info", "wbe"]).await);
    assert_eq!(
        err, "karst: instance \"wbe\" not found; did you mean \"web\"?\n",
        "the server's suggestion stays"
    );
    let (_, err, code) = texts(&fake.run(&["lst"]).await);
    assert_eq!((err.lines().count(), code), (1, 2), "{err}");
    assert!(err.contains("list"), "{err}");
    let (_, err, code) = texts(&fake.run(&["query", "-X", "DELETE", "/1.0/broken"]).await);
    assert_eq!((err.as_str(), code), ("karst: a; b\n", 1));
}

#[tokio::test]
async fn no_server_is_said_so() {
    let output = karst(&nowhere(), &["list"]).output().await.unwrap();
    let (_, err, code) = texts(&output);
    assert_eq!(code, 1);
    assert!(
        err.starts_with("karst: no server at /nonexistent/karst/unix.socket") && err.lines().count() == 1,
        "{err}"
    );
}

#[tokio::test]
async fn long_socket_paths_work() {
    let fake = Fake::start().await;
    let long = fake.dir.path().join("d".repeat(100));
    std::fs::create_dir(&long).unwrap();
    std::fs::rename(fake.dir.path().join("unix.socket"), long.join("unix.socket")).unwrap();
    let output = karst(&long, &["list", "-f", "csv"]).output().await.unwrap();
    let (out, err, code) = texts(&output);
    assert_eq!((err.as_str(), code), ("", 0));
    assert!(out.contains("c1"));
}

#[tokio::test]
async fn a_closed_pipe_is_no_error() {
    let fake = Fake::start().await;
    for command in [&["list"][..], &["query", "/1.0/instances"], &["--help"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = fake.karst(command).stdout(Stdio::from(writer)).spawn().unwrap();
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
        let (_, err, code) = texts(&output);
        assert_eq!((err.as_str(), code), ("", 0), "{command:?}");
    }
}

#[tokio::test]
async fn launch_is_one_request_and_one_wait() {
    let fake = Fake::start().await;
    let (out, err, code) =
        texts(&fake.run(&["launch", "ok", "--vm", "-c", "limits.cpu=2", "--vmid", "105"]).await);
    assert_eq!((out.as_str(), err.as_str(), code), ("chosen\n", "", 0), "the name that the server chose");
    let wait = "GET /1.0/operations/00000000-0000-4000-8000-000000000001/wait?timeout=-1";
    assert_eq!(fake.requests(), ["POST /1.0/instances", wait]);
    assert_eq!(
        fake.bodies(),
        [
            json!({"type": "virtual-machine", "source": {"type": "image", "alias": "ok"}, "start": true, "vmid": 105,
                "config": {"limits.cpu": "2"}, "devices": {}})
        ]
    );
}

#[tokio::test]
async fn a_failed_operation_is_an_error() {
    let fake = Fake::start().await;
    let (out, err, code) = texts(&fake.run(&["launch", "bad", "c2"]).await);
    assert_eq!(
        (out.as_str(), err.as_str(), code),
        ("", "karst: Failed creating instance:; no space left\n", 1)
    );
    let (_, err, code) = texts(&fake.run(&["launch", "absent", "c2"]).await);
    assert_eq!(code, 1);
    assert_eq!(
        err,
        "karst: image \"absent\" not found in project \"default\" (karst image list shows what is there)\n"
    );
}

#[tokio::test]
async fn a_wait_outlives_the_server() {
    let fake = Fake::start().await;
    let (_, err, code) = texts(&fake.run(&["launch", "restart", "c2"]).await);
    assert_eq!((err.as_str(), code), ("", 0));
    assert_eq!(fake.requests().iter().filter(|request| request.contains("/wait")).count(), 2);
}

#[tokio::test]
async fn ctrl_c_cancels_what_may_be_cancelled() {
    let fake = Fake::start().await;
    let child = fake.karst(&["launch", "slow", "c2"]).spawn().unwrap();
    fake.until("the wait", |fake| fake.requests().iter().any(|request| request.contains("/wait"))).await;
    signal(&child, Signal::INT);
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
    let (_, err, code) = texts(&output);
    assert_eq!((err.as_str(), code), ("karst: cancelled\n", 130));
    let id = "00000000-0000-4000-8000-000000000001";
    assert!(fake.requests().contains(&format!("DELETE /1.0/operations/{id}")), "{:?}", fake.requests());
}

#[tokio::test]
async fn ctrl_c_says_what_goes_on() {
    let fake = Fake::start().await;
    let child = fake.karst(&["launch", "stuck", "c2"]).spawn().unwrap();
    fake.until("the wait", |fake| fake.requests().iter().any(|request| request.contains("/wait"))).await;
    signal(&child, Signal::INT);
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
    let (_, err, code) = texts(&output);
    assert_eq!(code, 130);
    assert!(err.contains("00000000-0000-4000-8000-000000000001 goes on in the server"), "{err}");
}

#[tokio::test]
async fn several_names_fail_one_by_one() {
    let fake = Fake::start().await;
    let (_, err, code) = texts(&fake.run(&["delete", "a", "c1", "gone", "b"]).await);
    assert_eq!(code, 1);
    assert_eq!(
        err,
        "karst: c1: Instance is running\n\
         karst: instance \"gone\" not found in project \"default\" (karst list shows what is there)\n"
    );
    for name in ["a", "b"] {
        assert!(fake.requests().contains(&format!("DELETE /1.0/instances/{name}")));
    }
}

#[tokio::test]
async fn changing_a_key_keeps_the_rest_and_others_changes() {
    let fake = Fake::start().await;
    let (_, err, code) = texts(&fake.run(&["config", "set", "c1", "limits.memory=1GiB", "user.a=b=c"]).await);
    assert_eq!((err.as_str(), code), ("", 0));
    let puts = fake.requests().iter().filter(|request| request.starts_with("PUT")).count();
    assert_eq!(puts, 2, "tried again after somebody else's change");
    let config = json!({"user.before": "1", "limits.memory": "1GiB", "user.a": "b=c"});
    assert_eq!(fake.bodies()[1], json!({"config": config, "description": "kept"}));
    let (_, err, code) = texts(&fake.run(&["config", "unset", "c1", "nope"]).await);
    assert_eq!((err.as_str(), code), ("karst: instance \"c1\" has no key \"nope\"\n", 1));
    let (out, _, _) = texts(&fake.run(&["config", "get", "c1", "user.inherited", "--expanded"]).await);
    assert_eq!(out, "2\n");
}

#[tokio::test]
async fn stop_says_force_and_timeout() {
    let fake = Fake::start().await;
    let (_, err, code) = texts(&fake.run(&["stop", "c1", "--timeout", "5"]).await);
    assert_eq!((err.as_str(), code), ("", 0));
    let (_, _, code) = texts(&fake.run(&["restart", "c1", "-f"]).await);
    assert_eq!(code, 0);
    assert_eq!(
        fake.bodies(),
        [
            json!({"action": "stop", "force": false, "timeout": 5}),
            json!({"action": "restart", "force": true, "timeout": -1})
        ]
    );
}

#[tokio::test]
async fn image_build_prints_the_fingerprint() {
    let fake = Fake::start().await;
    let (out, err, code) = texts(&fake.run(&["image", "build", "debian/12", "--vm", "--alias", "d12"]).await);
    assert_eq!((out.as_str(), err.as_str(), code), ("f00dfeed\n", "", 0));
    assert_eq!(
        fake.bodies(),
        [json!({"recipe": "debian/12", "type": "virtual-machine", "aliases": ["d12"]})]
    );
}

#[tokio::test]
async fn passwords_of_displays_come_from_stdin_or_a_file() {
    let fake = Fake::start().await;
    let (out, err, code) = texts(&fake.run(&["display", "show", "v1"]).await);
    assert_eq!((out.as_str(), err.as_str(), code), ("a display without a password\n", "", 0));
    let (out, err, code) = texts(&fake.run_with(&["display", "set-password", "v1"], b"sesame\n").await);
    assert_eq!((out.as_str(), err.as_str(), code), ("", "", 0));
    let local = tempfile::tempdir().unwrap();
    let file = local.path().join("password");
    std::fs::write(&file, "other").unwrap();
    let end = "2030-01-01T00:00:00Z";
    let line = ["display", "set-password", "v1", "--file", file.to_str().unwrap(), "--until", end];
    let (_, err, code) = texts(&fake.run(&line).await);
    assert_eq!((err.as_str(), code), ("", 0));
    assert_eq!(
        fake.bodies(),
        [json!({"password": "sesame", "valid_to": null}), json!({"password": "other", "valid_to": end})]
    );
    let (out, _, _) = texts(&fake.run(&["display", "show", "v1"]).await);
    assert_eq!(out, format!("a display with a password, valid until {end}\n"));
    // Nothing is asked of the server without one; and none is taken from the command line.
    let before = fake.requests().len();
    let (_, err, code) = texts(&fake.run(&["display", "set-password", "v1"]).await);
    assert_eq!((err.lines().count(), code), (1, 1), "{err}");
    let (_, _, code) = texts(&fake.run(&["display", "set-password", "v1", "sesame"]).await);
    assert_eq!((code, fake.requests().len()), (2, before));
}

#[tokio::test]
async fn values_of_secrets_are_not_on_the_command_line() {
    let fake = Fake::start().await;
    for line in [&["secret", "create", "sesame"][..], &["secret", "set", "a2b1", "sesame"]] {
        let (_, _, code) = texts(&fake.run(line).await);
        assert_eq!(code, 2, "{line:?}");
    }
    // Nor is anything asked of the server without one.
    for line in [&["secret", "create", "--type", "volume", "--usage", "/a"][..], &["secret", "set", "a2b1"]] {
        let (_, err, code) = texts(&fake.run(line).await);
        assert_eq!((err.lines().count(), code), (1, 1), "{line:?}: {err}");
    }
    assert_eq!(fake.requests(), Vec::<String>::new());
}

#[tokio::test]
async fn passwords_of_registries_come_from_stdin() {
    let fake = Fake::start().await;
    let line = ["image", "registry", "add", "registry.example:5000", "--user", "robot"];
    let (out, err, code) = texts(&fake.run_with(&line, b"open sesame\n").await);
    assert_eq!((out.as_str(), err.as_str(), code), ("", "", 0));
    assert_eq!(fake.bodies(), [json!({"user": "robot", "password": "open sesame", "certificate": null})]);
    let (out, _, _) = texts(&fake.run(&["image", "registry", "list", "--format", "csv"]).await);
    assert_eq!(out, "registry.example:5000,robot\n");
    let (_, err, code) = texts(&fake.run(&["image", "registry", "remove", "registry.example:5000"]).await);
    assert_eq!((err.as_str(), code), ("", 0));
    let asked = ["PUT", "GET", "DELETE"].map(|method| match method {
        "GET" => "GET /1.0/karst/registries".to_owned(),
        other => format!("{other} /1.0/karst/registries/registry.example:5000"),
    });
    assert_eq!(fake.requests(), asked);
}

#[tokio::test]
async fn files_go_there_and_back() {
    let fake = Fake::start().await;
    let local = tempfile::tempdir().unwrap();
    let contents: Vec<u8> = (0..700_000u32).map(|n| (n % 251) as u8).collect();
    let file = local.path().join("data");
    std::fs::write(&file, &contents).unwrap();
    let file = file.to_str().unwrap();
    let (_, err, code) =
        texts(&fake.run(&["file", "push", file, "c1/tmp/", "--mode", "0640", "--uid", "7"]).await);
    assert_eq!((err.as_str(), code), ("", 0));
    let back = local.path().join("back");
    let (_, err, code) = texts(&fake.run(&["file", "pull", "c1/tmp/data", back.to_str().unwrap()]).await);
    assert_eq!((err.as_str(), code), ("", 0));
    assert!(std::fs::read(&back).unwrap() == contents);
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(&back).unwrap().permissions().mode() & 0o7777, 0o640);
    let output = fake.run(&["file", "pull", "c1/tmp/data", "-"]).await;
    assert!(output.stdout == contents && output.status.success());
    let (_, err, code) = texts(&fake.run_with(&["file", "push", "-", "c1/etc/motd"], b"hello\n").await);
    assert_eq!((err.as_str(), code), ("", 0));
    assert_eq!(fake.run(&["file", "pull", "c1/etc/motd", "-"]).await.stdout, b"hello\n");
    let (_, err, code) = texts(&fake.run(&["file", "pull", "c1/etc/nope", "-"]).await);
    assert_eq!((err.as_str(), code), ("karst: c1/etc/nope: no such file or directory\n", 1));
}

#[tokio::test]
async fn a_guest_cannot_write_outside_the_target() {
    let fake = Fake::start().await;
    let local = tempfile::tempdir().unwrap();
    let target = local.path().join("in");
    let (_, err, code) = texts(&fake.run(&["file", "pull", "-r", "c1/evil", target.to_str().unwrap()]).await);
    assert_eq!(code, 1);
    assert!(err.contains("impossible name"), "{err}");
    assert!(!local.path().join("escaped").exists());
}

#[tokio::test]
async fn names_are_completed_from_the_server() {
    let fake = Fake::start().await;
    let mut command = fake.karst(&["--", "karst", "exec", "c"]);
    command.env("COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", "2").env("_CLAP_COMPLETE_COMP_TYPE", "9");
    let (out, _, _) = texts(&command.output().await.unwrap());
    assert!(out.split_whitespace().any(|word| word == "c1"), "{out}");
    let (script, err, code) = texts(&fake.run(&["completion", "zsh"]).await);
    assert_eq!((err.as_str(), code), ("", 0));
    assert!(script.contains("COMPLETE=\"zsh\""), "{script}");
}
