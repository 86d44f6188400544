//! `GET /1.0/metrics`: figures of instances and the server, under Incus' names, in Prometheus' text form, or as OpenMetrics
//! when the client asks for that. A figure that is not known is left out, never 0.

use crate::{
    app::Call,
    respond::{Reply, full},
};
use hyper::{
    Response,
    header::{ACCEPT, CONTENT_TYPE, HeaderValue},
};
use karst_engine::InstanceView;
use karst_model::{
    Result,
    guest::{Details, Metrics},
    instance::InstanceKind,
    keys,
    spec::CpuLimit,
};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fmt::Write,
    sync::{Arc, LazyLock},
};

/// Name, whether it only grows, help.
const FAMILIES: &[(&str, bool, &str)] = &[
    ("incus_cpu_effective_total", false, "Total number of effective CPUs."),
    ("incus_cpu_seconds_total", true, "Total number of CPU time used in seconds."),
    ("incus_disk_read_bytes_total", true, "Total number of bytes read."),
    ("incus_disk_reads_completed_total", true, "Total number of completed reads."),
    ("incus_disk_writes_completed_total", true, "Total number of completed writes."),
    ("incus_disk_written_bytes_total", true, "Total number of bytes written."),
    ("incus_filesystem_avail_bytes", false, "Available space in bytes."),
    ("incus_filesystem_free_bytes", false, "Free space in bytes."),
    ("incus_filesystem_size_bytes", false, "Size of the file system in bytes."),
    ("incus_memory_Active_anon_bytes", false, "Amount of anonymous memory on active LRU list."),
    ("incus_memory_Active_bytes", false, "Amount of memory on active LRU list."),
    ("incus_memory_Active_file_bytes", false, "Amount of file-backed memory on active LRU list."),
    ("incus_memory_Cached_bytes", false, "Amount of cached memory."),
    ("incus_memory_Dirty_bytes", false, "Amount of memory waiting to get written back to the disk."),
    ("incus_memory_HugepagesFree_bytes", false, "Amount of free memory for hugetlb."),
    ("incus_memory_HugepagesTotal_bytes", false, "Amount of used memory for hugetlb."),
    ("incus_memory_Inactive_anon_bytes", false, "Amount of anonymous memory on inactive LRU list."),
    ("incus_memory_Inactive_bytes", false, "Amount of memory on inactive LRU list."),
    ("incus_memory_Inactive_file_bytes", false, "Amount of file-backed memory on inactive LRU list."),
    ("incus_memory_Mapped_bytes", false, "Amount of mapped memory."),
    ("incus_memory_MemAvailable_bytes", false, "Amount of available memory."),
    ("incus_memory_MemFree_bytes", false, "Amount of free memory."),
    ("incus_memory_MemTotal_bytes", false, "Amount of used memory."),
    ("incus_memory_OOM_kills_total", true, "Number of out of memory kills."),
    ("incus_memory_RSS_bytes", false, "Amount of anonymous and swap cache memory."),
    ("incus_memory_Shmem_bytes", false, "Amount of cached filesystem data that is swap-backed."),
    ("incus_memory_Swap_bytes", false, "Amount of used swap memory."),
    ("incus_memory_Unevictable_bytes", false, "Amount of unevictable memory."),
    ("incus_memory_Writeback_bytes", false, "Amount of memory queued for syncing to disk."),
    ("incus_network_receive_bytes_total", true, "Amount of received bytes on a given interface."),
    ("incus_network_receive_drop_total", true, "Amount of received dropped packets on a given interface."),
    ("incus_network_receive_errs_total", true, "Amount of received errors on a given interface."),
    ("incus_network_receive_packets_total", true, "Amount of received packets on a given interface."),
    ("incus_network_transmit_bytes_total", true, "Amount of transmitted bytes on a given interface."),
    (
        "incus_network_transmit_drop_total",
        true,
        "Amount of transmitted dropped packets on a given interface.",
    ),
    ("incus_network_transmit_errs_total", true, "Amount of transmitted errors on a given interface."),
    ("incus_network_transmit_packets_total", true, "Amount of transmitted packets on a given interface."),
    ("incus_operations_total", false, "Number of running operations"),
    ("incus_procs_total", false, "Number of running processes."),
    ("incus_uptime_seconds", false, "Daemon uptime (in seconds)."),
    ("incus_warnings_total", false, "Number of active warnings."),
];

/// Samples by family: labels and value.
type Samples = BTreeMap<&'static str, Vec<(String, f64)>>;

fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(['\\', '"', '\n']) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

/// The labels that all samples of an instance have. They are many: this is made once.
fn own_labels(view: &InstanceView) -> String {
    let kind = match view.instance.kind {
        InstanceKind::Container => "container",
        InstanceKind::VirtualMachine => "virtual-machine",
    };
    let (name, project) = (escape(&view.instance.name), escape(&view.project.name));
    format!("name=\"{name}\",project=\"{project}\",type=\"{kind}\"")
}

/// Those of one sample, by name: what only some have stands before what all have.
fn labels(own: &str, more: &[(&str, &str)]) -> String {
    debug_assert!(more.iter().map(|(k, _)| *k).chain(["name"]).is_sorted());
    let mut text =
        String::with_capacity(own.len() + 2 + more.iter().map(|(k, v)| k.len() + v.len() + 4).sum::<usize>());
    text.push('{');
    for (key, value) in more {
        text.extend([*key, "=\"", &*escape(value), "\","]);
    }
    text.push_str(own);
    text.push('}');
    text
}

/// CPUs that an instance may use of `host`: what its limit says, else one of a machine, all of a container.
fn effective_cpus(view: &InstanceView, host: u32) -> Option<f64> {
    let limit = keys::limits(&view.expanded_config).ok()?.cpu;
    let cpus = match (limit, view.instance.kind) {
        (Some(CpuLimit::Count { n }), _) => n,
        (Some(CpuLimit::Set { cpus }), _) => u32::try_from(cpus.len()).ok()?,
        (None, InstanceKind::VirtualMachine) => 1,
        (None, InstanceKind::Container) => host,
    };
    (cpus > 0).then_some(f64::from(cpus))
}

/// The family of a part of memory, as hosts and agents name it.
fn memory_family(part: &str) -> Option<&'static str> {
    static PARTS: LazyLock<HashMap<&str, &str>> = LazyLock::new(|| {
        let part =
            |name: &'static str| Some((name.strip_prefix("incus_memory_")?.strip_suffix("_bytes")?, name));
        FAMILIES.iter().filter_map(|(name, _, _)| part(name)).collect()
    });
    PARTS.get(part).copied()
}

fn instance(samples: &mut Samples, view: &InstanceView, m: &Metrics, host_cpus: u32) {
    let own = own_labels(view);
    let mut add = |name: &'static str, more: &[(&str, &str)], value: Option<f64>| {
        if let Some(value) = value {
            samples.entry(name).or_default().push((labels(&own, more), value));
        }
    };
    let number = |n: Option<u64>| n.map(|n| n as f64);
    let none = Details::default();
    let d = m.details.as_deref().unwrap_or(&none);
    add("incus_cpu_effective_total", &[], effective_cpus(view, host_cpus));
    for processor in &d.processors {
        let cpu = processor.number.to_string();
        for (mode, ns) in &processor.modes {
            let labels = [("cpu", cpu.as_str()), ("mode", mode.as_str())];
            add("incus_cpu_seconds_total", &labels, Some(*ns as f64 / 1e9));
        }
    }
    for (device, disk) in &d.disks {
        let device = [("device", device.as_str())];
        add("incus_disk_read_bytes_total", &device, Some(disk.read_bytes as f64));
        add("incus_disk_reads_completed_total", &device, number(disk.reads));
        add("incus_disk_written_bytes_total", &device, Some(disk.written_bytes as f64));
        add("incus_disk_writes_completed_total", &device, number(disk.writes));
    }
    for f in &d.filesystems {
        let place = [("device", &*f.device), ("fstype", &*f.kind), ("mountpoint", &*f.mount_point)];
        add("incus_filesystem_avail_bytes", &place, Some(f.available as f64));
        add("incus_filesystem_free_bytes", &place, Some(f.free as f64));
        add("incus_filesystem_size_bytes", &place, Some(f.size as f64));
    }
    for (part, bytes) in &d.memory {
        if let Some(family) = memory_family(part) {
            add(family, &[], Some(*bytes as f64));
        }
    }
    // What the system inside tells goes before what the host sees of it.
    for (part, family, value) in [
        ("MemTotal", "incus_memory_MemTotal_bytes", m.memory_total),
        ("RSS", "incus_memory_RSS_bytes", m.memory),
        ("Swap", "incus_memory_Swap_bytes", m.swap),
    ] {
        add(family, &[], number(value.filter(|_| !d.memory.contains_key(part))));
    }
    add("incus_memory_OOM_kills_total", &[], number(d.oom_kills));
    add("incus_procs_total", &[], number(m.processes));
    let inside = m.interfaces.iter().map(|(name, i)| (name.as_str(), i.counters, i.losses));
    // Seen from the host only where nobody inside tells.
    let outside = d.nics.iter().filter(|_| m.interfaces.is_empty()).map(|(name, n)| {
        let counters = [n.received_bytes, n.sent_bytes, n.received_packets, n.sent_packets];
        (name.as_str(), counters, [n.received_errors, n.sent_errors, n.received_drops, n.sent_drops])
    });
    for (device, counters, losses) in inside.chain(outside) {
        let device = [("device", device)];
        let [received, sent, packets_received, packets_sent] = counters.map(|n| Some(n as f64));
        add("incus_network_receive_bytes_total", &device, received);
        add("incus_network_transmit_bytes_total", &device, sent);
        add("incus_network_receive_packets_total", &device, packets_received);
        add("incus_network_transmit_packets_total", &device, packets_sent);
        let [errors_received, errors_sent, drops_received, drops_sent] = losses.map(|n| Some(n as f64));
        add("incus_network_receive_errs_total", &device, errors_received);
        add("incus_network_transmit_errs_total", &device, errors_sent);
        add("incus_network_receive_drop_total", &device, drops_received);
        add("incus_network_transmit_drop_total", &device, drops_sent);
    }
}

/// Prometheus' text form 0.0.4, or OpenMetrics 1.0, where a family that only grows is named without its `_total`.
fn render(samples: &Samples, open: bool) -> String {
    let mut text = String::new();
    for (name, grows, help) in FAMILIES {
        let Some(found) = samples.get(name) else { continue };
        let family = if open && *grows { name.trim_end_matches("_total") } else { name };
        // OpenMetrics keeps `_total` for what only grows.
        let (family, name) = match open && !*grows {
            true => (family.trim_end_matches("_total"), name.trim_end_matches("_total")),
            false => (family, *name),
        };
        let kind = if *grows { "counter" } else { "gauge" };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {family} {help}\n# TYPE {family} {kind}");
        for (labels, value) in found {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    }
    text + "# EOF\n"
}

/// `GET /1.0/metrics`: of the projects that the caller may see, or of `project` alone.
///
/// # Errors
/// Forbidden.
pub async fn get(call: Call) -> Result<Reply> {
    let engine = call.engine();
    let figures = engine.metrics(&call.context, call.query.get("project")).await?;
    let mut samples = Samples::new();
    let all: &[(Arc<InstanceView>, Metrics)] = &figures.instances;
    let host_cpus = {
        let records = engine.inner().inventory.read();
        records.nodes.get(&engine.inner().node).and_then(|n| n.facts.as_ref()).map_or(0, |f| f.cpus)
    };
    for (view, metrics) in all {
        instance(&mut samples, view, metrics, host_cpus);
    }
    if let Some(server) = &figures.server {
        for (name, value) in [
            ("incus_operations_total", server.operations as f64),
            ("incus_uptime_seconds", server.uptime.as_secs_f64().floor()),
            ("incus_warnings_total", server.warnings as f64),
        ] {
            samples.insert(name, vec![(String::new(), value)]);
        }
    }
    let open = call.header(ACCEPT.as_str()).is_some_and(|a| a.contains("application/openmetrics-text"));
    let mut reply = Response::new(full(render(&samples, open)));
    let kind = match open {
        true => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        false => "text/plain; version=0.0.4; charset=utf-8",
    };
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_sorted_and_rendered_in_both_forms() {
        assert!(FAMILIES.windows(2).all(|w| w[0].0 < w[1].0));
        assert_eq!(memory_family("Active_anon"), Some("incus_memory_Active_anon_bytes"));
        assert_eq!(memory_family("Buffers"), None);
        let samples = Samples::from([
            ("incus_cpu_seconds_total", vec![("{name=\"a\"}".to_owned(), 1.5)]),
            ("incus_procs_total", vec![("{name=\"a\"}".to_owned(), 3.0)]),
        ]);
        insta::assert_snapshot!(render(&samples, false), @r#"
        # HELP incus_cpu_seconds_total Total number of CPU time used in seconds.
        # TYPE incus_cpu_seconds_total counter
        incus_cpu_seconds_total{name="a"} 1.5
        # HELP incus_procs_total Number of running processes.
        # TYPE incus_procs_total gauge
        incus_procs_total{name="a"} 3
        # EOF
        "#);
        let open = render(&samples, true);
        assert!(open.contains("# TYPE incus_cpu_seconds counter\nincus_cpu_seconds_total{"), "{open}");
        assert!(open.contains("# TYPE incus_procs gauge\nincus_procs{"), "{open}");
        assert_eq!(escape("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
        let own = "name=\"c1\",project=\"p\"";
        assert_eq!(labels(own, &[]), "{name=\"c1\",project=\"p\"}");
        assert_eq!(
            labels(own, &[("cpu", "0"), ("mode", "a\"b")]),
            "{cpu=\"0\",mode=\"a\\\"b\",name=\"c1\",project=\"p\"}"
        );
    }
}
