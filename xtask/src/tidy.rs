//! What no compiler checks: the edges between crates, headers and sizes of files, and where programs may be executed.

use crate::root;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Most lines of code (without blank lines and comments) of a file.
const MAX_CODE_LINES: usize = 800;

/// Command lines that `virsh` answers otherwise with Karst than with libvirtd: the list with its reasons, and how many there are.
/// The number only goes down; who makes one the same lowers it.
const ACCEPTED: (&str, usize) = ("tests/clients/libvirt/accepted", 32);

/// Which crates of ours a crate may depend on. A crate that is missing here is a fault: think before adding one.
const EDGES: &[(&str, &[&str])] = &[
    ("karst-model", &[]),
    ("karst-env", &["karst-model"]),
    ("karst-store", &["karst-model", "karst-env"]),
    ("karst-host", &["karst-model"]),
    ("karst-guest", &["karst-model", "karst-host", "karst-keeper"]),
    ("karst-guest-agent", &[]),
    ("karst-vm-qemu", &["karst-model", "karst-host", "karst-guest", "karst-guest-agent"]),
    ("karst-ct-lxc", &["karst-model", "karst-host", "karst-guest", "karst-keeper"]),
    ("karst-storage", &["karst-model", "karst-host"]),
    ("karst-network", &["karst-model", "karst-host"]),
    ("karst-image", &["karst-model", "karst-host", "karst-guest-agent"]),
    ("karst-agent", &["karst-model", "karst-env"]),
    (
        "karst-agent-host",
        &[
            "karst-model",
            "karst-env",
            "karst-agent",
            "karst-host",
            "karst-guest",
            "karst-vm-qemu",
            "karst-ct-lxc",
            "karst-storage",
            "karst-network",
            "karst-image",
        ],
    ),
    ("karst-engine", &["karst-model", "karst-env", "karst-store", "karst-agent"]),
    ("karst-tls", &["karst-model"]),
    ("karst-frontend-incus", &["karst-model", "karst-engine", "karst-tls"]),
    ("karst-frontend-libvirt", &["karst-model", "karst-engine", "karst-tls"]),
    (
        "karstd",
        &[
            "karst-model",
            "karst-env",
            "karst-store",
            "karst-host",
            "karst-agent",
            "karst-agent-host",
            "karst-engine",
            "karst-frontend-incus",
            "karst-frontend-libvirt",
            "karst-tls",
            "karst-image",
        ],
    ),
    ("karst-keeper", &[]),
    ("karst", &[]),
    ("karst-testkit", &["karst-model", "karst-env", "karst-store", "karst-agent", "karst-engine"]),
    ("xtask", &["karst-model"]),
];

/// Places that may execute programs or write system files besides `crates/host`, each with its reason.
const EXECUTES: &[(&str, &str)] = &[
    ("crates/host/", "the one crate that does"),
    ("crates/karstd/src/launcher", "starts control and host"),
    ("crates/guest-agent/", "executes inside the guest"),
    ("crates/keeper/", "starts the guest; has no dependency on ours, to stay small"),
    ("crates/karst/src/editor.rs", "the user's own editor, as the user"),
    ("xtask/", "a tool"),
    ("bench/", "a tool"),
];

/// Everything that is wrong.
pub fn faults() -> Vec<String> {
    let mut faults = edges();
    let accepted = fs::read_to_string(root().join(ACCEPTED.0)).unwrap_or_default();
    check_accepted(&accepted, ACCEPTED.1, &mut faults);
    let mut files = vec![];
    for dir in ["crates", "xtask", "tests", "bench", "fuzz"] {
        collect(&root().join(dir), &mut files);
    }
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let name = file.strip_prefix(root()).unwrap_or(&file).display().to_string();
        check_file(&name, &text, &mut faults);
        if name.ends_with("/tests/all.rs") {
            let beside = fs::read_dir(file.parent().expect("a file has a directory")).into_iter().flatten();
            let names: Vec<_> =
                beside.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
            check_all_tests(&name, &text, &names, &mut faults);
        }
    }
    faults
}

/// Lines are command lines; reasons begin with `#`, and answers with a space.
fn check_accepted(text: &str, most: usize, faults: &mut Vec<String>) {
    let now = text.lines().filter(|line| !line.is_empty() && !line.starts_with(['#', ' '])).count();
    if now > most {
        faults
            .push(format!("{}: {now} differences are accepted, and there were {most}: mend one", ACCEPTED.0));
    } else if now < most {
        faults.push(format!(
            "{}: {now} differences are accepted: lower ACCEPTED in xtask/src/tidy.rs",
            ACCEPTED.0
        ));
    }
}

/// A file beside `tests/all.rs` that it does not name would never run.
fn check_all_tests(name: &str, text: &str, beside: &[String], faults: &mut Vec<String>) {
    for test in beside.iter().filter_map(|file| file.strip_suffix(".rs")).filter(|test| *test != "all") {
        if !text.lines().any(|line| line == format!("mod {test};")) {
            faults.push(format!("{name}: `mod {test};` is missing, so {test}.rs never runs"));
        }
    }
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() && path.file_name().is_some_and(|n| n != "target" && n != "node_modules") {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

fn check_file(name: &str, text: &str, faults: &mut Vec<String>) {
    if !text.starts_with("//!") && !text.starts_with("#!") {
        faults.push(format!("{name}: opens without //! (what is this file, and what not?)"));
    }
    let code = text.lines().filter(|l| !l.trim().is_empty() && !l.trim_start().starts_with("//")).count();
    if code > MAX_CODE_LINES {
        faults
            .push(format!("{name}: {code} lines of code; at most {MAX_CODE_LINES} can be held in the head"));
    }
    // A test that is skipped for want of something says so by `backends`, which fails where it is demanded; those that take long
    // are asked for by a variable of their own.
    for (n, line) in text.lines().enumerate() {
        let says = line.contains("println!(\"skipped");
        if says && !line.contains("KARST_TEST_") && name.starts_with("crates/") {
            let line = n + 1;
            faults.push(format!("{name}:{line}: is skipped by itself; see crates/testkit/src/backends.rs"));
        }
    }
    let test = name.contains("/tests/") || name.contains("/examples/") || name.ends_with("tests.rs");
    if test || EXECUTES.iter().any(|(prefix, _)| name.starts_with(prefix)) {
        return;
    }
    let mut in_tests = false;
    for (n, line) in text.lines().enumerate() {
        in_tests |= line.trim() == "#[cfg(test)]";
        let code = line.split("//").next().unwrap_or_default();
        if in_tests {
            continue;
        }
        if code.contains("Command::new(") && !code.contains("clap::Command::new(") {
            faults.push(format!(
                "{name}:{}: executes a program; only karst-host does (run(Program::..))",
                n + 1
            ));
        }
        let writes = ["fs::write(", "OpenOptions", "File::create("].iter().any(|w| code.contains(w));
        if writes && ["\"/proc/", "\"/sys/"].iter().any(|p| code.contains(p)) {
            faults.push(format!("{name}:{}: writes a system file; only karst-host does", n + 1));
        }
    }
}

fn edges() -> Vec<String> {
    let mut faults = vec![];
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output();
    let metadata: serde_json::Value = match output {
        Ok(o) if o.status.success() => serde_json::from_slice(&o.stdout).unwrap_or_default(),
        Ok(o) => {
            return vec![format!("cargo metadata failed: {}", String::from_utf8_lossy(&o.stderr))];
        }
        Err(e) => return vec![format!("cargo metadata cannot run: {e}")],
    };
    let table: BTreeMap<&str, &[&str]> = EDGES.iter().copied().collect();
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    let ours: Vec<String> = packages.iter().filter_map(|p| p["name"].as_str().map(str::to_owned)).collect();
    for package in &packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(allowed) = table.get(name) else {
            faults.push(format!("crate {name} is not in the table of edges (xtask/src/tidy.rs)"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            let dev = dependency["kind"].as_str() == Some("dev");
            if !dev && ours.iter().any(|o| o == on) && !allowed.contains(&on) {
                faults.push(format!("crate {name} must not depend on {on}"));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults_of(name: &str, text: &str) -> Vec<String> {
        let mut faults = vec![];
        check_file(name, text, &mut faults);
        faults
    }

    #[test]
    fn a_test_that_nobody_names_is_found() {
        let mut faults = vec![];
        let beside = ["all.rs", "one.rs", "two.rs", "common"].map(String::from);
        check_all_tests("crates/x/tests/all.rs", "//! A.\nmod one;\n", &beside, &mut faults);
        assert_eq!(faults, ["crates/x/tests/all.rs: `mod two;` is missing, so two.rs never runs"]);
    }

    #[test]
    fn accepted_differences_only_become_fewer() {
        let of = |most| {
            let mut faults = vec![];
            check_accepted("# A reason.\nuri\n    0 x\n\nnodeinfo\n    0 y\n", most, &mut faults);
            faults.len()
        };
        assert_eq!((of(1), of(2), of(3)), (1, 0, 1));
    }

    #[test]
    fn finds_what_it_looks_for() {
        assert!(faults_of("crates/x/src/a.rs", "//! A.\nfn a() {}\n").is_empty());
        assert_eq!(faults_of("crates/x/src/a.rs", "fn a() {}\n").len(), 1);
        assert_eq!(faults_of("crates/x/src/a.rs", "//! A.\nfn a() { Command::new(\"sh\"); }\n").len(), 1);
        assert!(faults_of("crates/host/src/a.rs", "//! A.\nfn a() { Command::new(\"sh\"); }\n").is_empty());
        assert_eq!(
            faults_of("crates/x/src/a.rs", "//! A.\nfn a() { fs::write(\"/sys/x\", b\"\"); }\n").len(),
            1
        );
        let skips = "//! A.\nfn a() { return println!(\"skipped: no root\"); }\n";
        assert_eq!(faults_of("crates/x/tests/a.rs", skips).len(), 1);
        let long = "//! A.\nfn a() { println!(\"skipped: long (KARST_TEST_LONG=1)\"); }\n";
        assert!(faults_of("crates/x/tests/a.rs", long).is_empty());
        let long = format!("//! A.\n{}", "let x = 1;\n".repeat(MAX_CODE_LINES + 1));
        assert_eq!(faults_of("crates/x/src/a.rs", &long).len(), 1);
    }
}
