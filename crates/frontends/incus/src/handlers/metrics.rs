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
use std::{borrow::Cow, collections::HashMap, fmt::Write, sync::LazyLock};

/// Name, whether it only grows, help.
type Family = (&'static str, bool, &'static str);

/// All, by name.
const FAMILIES: &[Family] = &[
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

/// Where a family stands in the table. For constants: a name that is not there does not compile.
const fn at(name: &str) -> usize {
    const fn same(one: &[u8], other: &[u8]) -> bool {
        let mut n = 0;
        while n < one.len() && n < other.len() && one[n] == other[n] {
            n += 1;
        }
        n == one.len() && n == other.len()
    }
    let mut n = 0;
    while n < FAMILIES.len() {
        if same(FAMILIES[n].0.as_bytes(), name.as_bytes()) {
            return n;
        }
        n += 1;
    }
    panic!("no such family")
}

/// The name of a family and that of its figures. In OpenMetrics a family is named without `_total`, which figures keep that
/// only grow.
fn names(family: &Family, open: bool) -> (&'static str, &'static str) {
    let (name, grows, _) = *family;
    let short = name.trim_end_matches("_total");
    match (open, grows) {
        (false, _) => (name, name),
        (true, true) => (short, name),
        (true, false) => (short, short),
    }
}

#[derive(Debug, Clone, Copy)]
enum Value {
    Whole(u64),
    Part(f64),
}

/// What is answered, a text for each family. There are many figures: each is written where it goes, once.
struct Lines {
    open: bool,
    /// Bytes that a family will have as a rule.
    usual: usize,
    of: Vec<String>,
}

impl Lines {
    /// Prometheus' text form 0.0.4, or OpenMetrics 1.0, of so many instances.
    fn new(open: bool, instances: usize) -> Self {
        Self { open, usual: 128 * instances.max(1), of: vec![String::new(); FAMILIES.len()] }
    }

    /// A figure. Labels go by name: `more`, which only some have, stand before `own`, which all of an instance have.
    fn add(&mut self, family: usize, more: &[(&str, &str)], own: &str, value: Value) {
        debug_assert!(more.iter().map(|(k, _)| *k).chain(["name"]).is_sorted());
        let text = &mut self.of[family];
        if text.is_empty() {
            text.reserve(self.usual);
        }
        text.push_str(names(&FAMILIES[family], self.open).1);
        if !own.is_empty() {
            text.push('{');
            for (key, value) in more {
                text.extend([*key, "=\"", &*escape(value), "\","]);
            }
            text.extend([own, "}"]);
        }
        // Writing to a string cannot fail.
        let _ = match value {
            Value::Whole(n) => writeln!(text, " {n}"),
            Value::Part(n) => writeln!(text, " {n}"),
        };
    }

    fn render(&self) -> String {
        let mut text = String::with_capacity(self.of.iter().map(|lines| lines.len() + 200).sum());
        for (family, lines) in FAMILIES.iter().zip(&self.of).filter(|(_, lines)| !lines.is_empty()) {
            let (name, kind) = (names(family, self.open).0, if family.1 { "counter" } else { "gauge" });
            text.extend(["# HELP ", name, " ", family.2, "\n# TYPE ", name, " ", kind, "\n", lines]);
        }
        text + "# EOF\n"
    }
}

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

/// CPUs that an instance may use of `host`: what its limit says, else one of a machine, all of a container.
fn effective_cpus(view: &InstanceView, host: u32) -> Option<u64> {
    let limit = match view.expanded_config.get("limits.cpu") {
        // As most have it: nothing of the others need be understood.
        None => None,
        Some(_) => keys::limits(&view.expanded_config).ok()?.cpu,
    };
    let cpus = match (limit, view.instance.kind) {
        (Some(CpuLimit::Count { n }), _) => n,
        (Some(CpuLimit::Set { cpus }), _) => u32::try_from(cpus.len()).ok()?,
        (None, InstanceKind::VirtualMachine) => 1,
        (None, InstanceKind::Container) => host,
    };
    (cpus > 0).then_some(u64::from(cpus))
}

/// The family of a part of memory, as hosts and agents name it.
fn memory_family(part: &str) -> Option<usize> {
    static PARTS: LazyLock<HashMap<&str, usize>> = LazyLock::new(|| {
        let part = |name: &'static str| name.strip_prefix("incus_memory_")?.strip_suffix("_bytes");
        FAMILIES.iter().enumerate().filter_map(|(at, family)| Some((part(family.0)?, at))).collect()
    });
    PARTS.get(part).copied()
}

fn instance(lines: &mut Lines, view: &InstanceView, m: &Metrics, host_cpus: u32) {
    let own = own_labels(view);
    let mut add = |family: usize, more: &[(&str, &str)], value: Option<Value>| {
        if let Some(value) = value {
            lines.add(family, more, &own, value);
        }
    };
    let number = |n: Option<u64>| n.map(Value::Whole);
    let whole = |n: u64| Some(Value::Whole(n));
    let none = Details::default();
    let d = m.details.as_deref().unwrap_or(&none);
    add(const { at("incus_cpu_effective_total") }, &[], number(effective_cpus(view, host_cpus)));
    for processor in &d.processors {
        let cpu = processor.number.to_string();
        for (mode, ns) in &processor.modes {
            let labels = [("cpu", cpu.as_str()), ("mode", mode.as_str())];
            add(const { at("incus_cpu_seconds_total") }, &labels, Some(Value::Part(*ns as f64 / 1e9)));
        }
    }
    for (device, disk) in &d.disks {
        let device = [("device", device.as_str())];
        add(const { at("incus_disk_read_bytes_total") }, &device, whole(disk.read_bytes));
        add(const { at("incus_disk_reads_completed_total") }, &device, number(disk.reads));
        add(const { at("incus_disk_written_bytes_total") }, &device, whole(disk.written_bytes));
        add(const { at("incus_disk_writes_completed_total") }, &device, number(disk.writes));
    }
    for f in &d.filesystems {
        let place = [("device", &*f.device), ("fstype", &*f.kind), ("mountpoint", &*f.mount_point)];
        add(const { at("incus_filesystem_avail_bytes") }, &place, whole(f.available));
        add(const { at("incus_filesystem_free_bytes") }, &place, whole(f.free));
        add(const { at("incus_filesystem_size_bytes") }, &place, whole(f.size));
    }
    for (part, bytes) in &d.memory {
        if let Some(family) = memory_family(part) {
            add(family, &[], whole(*bytes));
        }
    }
    // What the system inside tells goes before what the host sees of it.
    for (part, family, value) in [
        ("MemTotal", const { at("incus_memory_MemTotal_bytes") }, m.memory_total),
        ("RSS", const { at("incus_memory_RSS_bytes") }, m.memory),
        ("Swap", const { at("incus_memory_Swap_bytes") }, m.swap),
    ] {
        add(family, &[], number(value.filter(|_| !d.memory.contains_key(part))));
    }
    add(const { at("incus_memory_OOM_kills_total") }, &[], number(d.oom_kills));
    add(const { at("incus_procs_total") }, &[], number(m.processes));
    let inside = m.interfaces.iter().map(|(name, i)| (name.as_str(), i.counters, i.losses));
    // Seen from the host only where nobody inside tells.
    let outside = d.nics.iter().filter(|_| m.interfaces.is_empty()).map(|(name, n)| {
        let counters = [n.received_bytes, n.sent_bytes, n.received_packets, n.sent_packets];
        (name.as_str(), counters, [n.received_errors, n.sent_errors, n.received_drops, n.sent_drops])
    });
    for (device, counters, losses) in inside.chain(outside) {
        let device = [("device", device)];
        let [received, sent, packets_received, packets_sent] = counters.map(whole);
        add(const { at("incus_network_receive_bytes_total") }, &device, received);
        add(const { at("incus_network_transmit_bytes_total") }, &device, sent);
        add(const { at("incus_network_receive_packets_total") }, &device, packets_received);
        add(const { at("incus_network_transmit_packets_total") }, &device, packets_sent);
        let [errors_received, errors_sent, drops_received, drops_sent] = losses.map(whole);
        add(const { at("incus_network_receive_errs_total") }, &device, errors_received);
        add(const { at("incus_network_transmit_errs_total") }, &device, errors_sent);
        add(const { at("incus_network_receive_drop_total") }, &device, drops_received);
        add(const { at("incus_network_transmit_drop_total") }, &device, drops_sent);
    }
}

/// `GET /1.0/metrics`: of the projects that the caller may see, or of `project` alone.
///
/// # Errors
/// Forbidden.
pub async fn get(call: Call) -> Result<Reply> {
    let engine = call.engine();
    let figures = engine.metrics(&call.context, call.query.get("project")).await?;
    let open = call.header(ACCEPT.as_str()).is_some_and(|a| a.contains("application/openmetrics-text"));
    let mut lines = Lines::new(open, figures.instances.len());
    let host_cpus = {
        let records = engine.inner().inventory.read();
        records.nodes.get(&engine.inner().node).and_then(|n| n.facts.as_ref()).map_or(0, |f| f.cpus)
    };
    for (view, metrics) in figures.of_instances() {
        instance(&mut lines, view, metrics, host_cpus);
    }
    if let Some(server) = &figures.server {
        for (family, value) in [
            (const { at("incus_operations_total") }, server.operations as u64),
            (const { at("incus_uptime_seconds") }, server.uptime.as_secs()),
            (const { at("incus_warnings_total") }, server.warnings as u64),
        ] {
            lines.add(family, &[], "", Value::Whole(value));
        }
    }
    let mut reply = Response::new(full(lines.render()));
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
        assert_eq!(memory_family("Active_anon"), Some(at("incus_memory_Active_anon_bytes")));
        assert_eq!(memory_family("Buffers"), None);
        assert!(FAMILIES.iter().enumerate().all(|(n, family)| at(family.0) == n));
        let text = |open| {
            let mut lines = Lines::new(open, 2);
            lines.add(at("incus_procs_total"), &[], "name=\"a\"", Value::Whole(u64::MAX));
            lines.add(at("incus_cpu_seconds_total"), &[], "name=\"a\"", Value::Part(1.5));
            let more = [("cpu", "0"), ("mode", "a\"b")];
            lines.add(at("incus_cpu_seconds_total"), &more, "name=\"c\"", Value::Part(3.0));
            lines.add(at("incus_warnings_total"), &[], "", Value::Whole(0));
            lines.render()
        };
        insta::assert_snapshot!(text(false), @r#"
        # HELP incus_cpu_seconds_total Total number of CPU time used in seconds.
        # TYPE incus_cpu_seconds_total counter
        incus_cpu_seconds_total{name="a"} 1.5
        incus_cpu_seconds_total{cpu="0",mode="a\"b",name="c"} 3
        # HELP incus_procs_total Number of running processes.
        # TYPE incus_procs_total gauge
        incus_procs_total{name="a"} 18446744073709551615
        # HELP incus_warnings_total Number of active warnings.
        # TYPE incus_warnings_total gauge
        incus_warnings_total 0
        # EOF
        "#);
        let open = text(true);
        assert!(open.contains("# TYPE incus_cpu_seconds counter\nincus_cpu_seconds_total{"), "{open}");
        assert!(open.contains("# TYPE incus_procs gauge\nincus_procs{"), "{open}");
        assert!(open.contains("# TYPE incus_warnings gauge\nincus_warnings 0\n# EOF\n"), "{open}");
        assert_eq!(escape("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
