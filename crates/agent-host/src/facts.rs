//! What the machine is.

use crate::policy::HostPolicy;
use karst_host::{Program, run};
use karst_model::{
    Result,
    node::{AcceleratorKind, HostFacts},
};
use std::time::Duration;

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Facts that hold as long as the process: asked for once.
pub(crate) async fn collect() -> Result<HostFacts> {
    let system = rustix::system::uname();
    let release = read("/etc/os-release");
    let field = |key: &str| {
        let line = release.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    let memory = read("/proc/meminfo");
    let memory = memory
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok());
    let mut facts = HostFacts {
        boot_id: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
        hostname: system.nodename().to_string_lossy().into_owned(),
        architecture: system.machine().to_string_lossy().into_owned(),
        kernel: system.release().to_string_lossy().into_owned(),
        os_name: field("NAME"),
        os_version: field("VERSION_ID"),
        cgroup_layout: cgroup_layout(&read("/proc/self/mounts")).into(),
        cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        memory: memory.unwrap_or(0) << 10,
        ..HostFacts::default()
    };
    facts.lxc = version(Program::LxcStart).await;
    Ok(facts)
}

/// What may change while the process runs, as modules are loaded and packages installed, or because a program that was asked
/// did not answer in time. What does not change costs next to nothing.
pub(crate) async fn complete(facts: &mut HostFacts, policy: &HostPolicy) {
    if facts.lxc.is_none() {
        facts.lxc = version(Program::LxcStart).await;
    }
    facts.storage = crate::pool_kinds::all(policy).await;
    facts.screens = policy.screens();
    facts.accelerator = karst_vm_qemu::probe::accelerator();
    match karst_vm_qemu::probe().await {
        Ok(found) => {
            (facts.qemu, facts.default_machine) = (Some(found.qemu_version), Some(found.default_machine));
            facts.spice = found.spice;
            facts.virtiofs = karst_vm_qemu::virtiofs::demand_program().await.is_ok();
            if facts.accelerator.kind == AcceleratorKind::Tcg {
                facts.warnings.push(facts.accelerator.reason.clone());
            }
        }
        // What is not installed is named below.
        Err(_) if Program::QemuSystemX86.path().is_err() => {}
        Err(e) => {
            tracing::warn!(error = %e, context = e.context, "QEMU does not say what it is; asking again later");
            facts
                .warnings
                .push("QEMU is installed, but has not said yet what it is; it is asked again".into());
        }
    }
    for program in
        [Program::QemuSystemX86, Program::LxcStart, Program::Dnsmasq, Program::Nft, Program::Keeper]
    {
        if let Err(e) = program.path() {
            facts.warnings.push(e.message);
        }
    }
}

fn cgroup_layout(mounts: &str) -> &'static str {
    let has = |kind: &str| mounts.lines().any(|l| l.split(' ').nth(2) == Some(kind));
    match (has("cgroup"), has("cgroup2")) {
        (false, true) => "v2",
        (true, true) => "hybrid",
        _ => "v1",
    }
}

/// The first number of what `--version` prints.
async fn version(program: Program) -> Option<String> {
    program.path().ok()?;
    let text = run(program).arg("--version").timeout(Duration::from_secs(5)).ok().await.ok()?;
    let text = String::from_utf8_lossy(&text);
    let number = text.split_whitespace().find(|w| w.starts_with(|c: char| c.is_ascii_digit()))?;
    Some(number.trim_end_matches([',', ')']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_layouts() {
        assert_eq!(cgroup_layout("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"), "v2");
        let hybrid =
            "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\nx /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup_layout(hybrid), "hybrid");
        assert_eq!(cgroup_layout("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"), "v1");
    }
}
