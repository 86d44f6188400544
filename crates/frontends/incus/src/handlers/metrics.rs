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
use karst_model::{Result, guest::Metrics, instance::InstanceKind, keys, spec::CpuLimit};
use std::{collections::BTreeMap, fmt::Write, sync::Arc};

/// Name, whether it only grows, help.
const FAMILIES: &[(&str, bool, &str)] = &[
    ("incus_cpu_effective_total", false, "Total number of effective CPUs."),
    ("incus_cpu_seconds_total", true, "Total number of CPU time used in seconds."),
    ("incus_memory_MemAvailable_bytes", false, "Amount of available memory."),
    ("incus_memory_MemFree_bytes", false, "Amount of free memory."),
    ("incus_memory_MemTotal_bytes", false, "Amount of used memory."),
    (
        "incus_memory_RSS_bytes",
        false,
        "Amount of anonymous and swap cache memory (includes transparent hugepages).",
    ),
    ("incus_memory_Swap_bytes", false, "Amount of used swap memory."),
    ("incus_network_receive_bytes_total", true, "Amount of received bytes on a given interface."),
    ("incus_network_receive_packets_total", true, "Amount of received packets on a given interface."),
    ("incus_network_transmit_bytes_total", true, "Amount of transmitted bytes on a given interface."),
    ("incus_network_transmit_packets_total", true, "Amount of transmitted packets on a given interface."),
    ("incus_operations_total", false, "Number of running operations"),
    ("incus_procs_total", false, "Number of running processes."),
    ("incus_uptime_seconds", false, "Daemon uptime (in seconds)."),
    ("incus_warnings_total", false, "Number of active warnings."),
];

/// Samples by family: labels and value.
type Samples = BTreeMap<&'static str, Vec<(String, f64)>>;

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn labels(view: &InstanceView, more: &[(&str, &str)]) -> String {
    let kind = match view.instance.kind {
        InstanceKind::Container => "container",
        InstanceKind::VirtualMachine => "virtual-machine",
    };
    let mut all: Vec<(&str, &str)> = more.to_vec();
    all.extend([("name", &*view.instance.name), ("project", &*view.project.name), ("type", kind)]);
    all.sort();
    let pairs: Vec<_> = all.iter().map(|(k, v)| format!("{k}=\"{}\"", escape(v))).collect();
    format!("{{{}}}", pairs.join(","))
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

fn instance(samples: &mut Samples, view: &InstanceView, m: &Metrics, host_cpus: u32) {
    let mut add = |name: &'static str, more: &[(&str, &str)], value: Option<f64>| {
        if let Some(value) = value {
            samples.entry(name).or_default().push((labels(view, more), value));
        }
    };
    let number = |n: Option<u64>| n.map(|n| n as f64);
    let cpu = m.cpu_ns.map(|ns| ns as f64 / 1e9);
    add("incus_cpu_effective_total", &[], effective_cpus(view, host_cpus));
    add("incus_cpu_seconds_total", &[("cpu", "0"), ("mode", "total")], cpu);
    let free = m.memory_total.zip(m.memory).map(|(total, used)| total.saturating_sub(used));
    add("incus_memory_MemAvailable_bytes", &[], number(free));
    add("incus_memory_MemFree_bytes", &[], number(free));
    add("incus_memory_MemTotal_bytes", &[], number(m.memory_total));
    add("incus_memory_RSS_bytes", &[], number(m.memory));
    add("incus_memory_Swap_bytes", &[], number(m.swap));
    add("incus_procs_total", &[], number(m.processes));
    for (device, interface) in &m.interfaces {
        let device = [("device", device.as_str())];
        let [received, sent, packets_received, packets_sent] = interface.counters.map(|n| Some(n as f64));
        add("incus_network_receive_bytes_total", &device, received);
        add("incus_network_transmit_bytes_total", &device, sent);
        add("incus_network_receive_packets_total", &device, packets_received);
        add("incus_network_transmit_packets_total", &device, packets_sent);
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
    }
}
