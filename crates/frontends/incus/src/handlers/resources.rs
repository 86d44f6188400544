//! `/1.0/resources`: the host's hardware, in Incus' words.

use crate::{
    app::Call,
    respond::{Reply, sync},
};
use karst_model::{Result, access::Permission};
use serde_json::{Value, json};

/// `GET /1.0/resources`. Serial numbers and hardware addresses are for who may inspect the server.
///
/// # Errors
/// Forbidden, unavailable.
pub async fn get(call: Call) -> Result<Reply> {
    let r = call.engine().host_resources(&call.context).await?;
    let inspects = call.context.principal().may(Permission::ServerInspect, None);
    let secret = |text: &str| if inspects { text.to_owned() } else { String::new() };
    let architecture = {
        let inner = call.engine().inner();
        let records = inner.inventory.read();
        let facts = records.nodes.get(&inner.node).and_then(|n| n.facts.as_ref());
        facts.map(|f| f.architecture.clone()).unwrap_or_default()
    };
    let threads: usize = r.sockets.iter().flat_map(|s| &s.cores).map(|c| c.threads.len()).sum();
    let sockets: Vec<Value> = r
        .sockets
        .iter()
        .map(|s| {
            let cores: Vec<Value> = s
                .cores
                .iter()
                .map(|c| {
                    let threads: Vec<Value> = c
                        .threads
                        .iter()
                        .enumerate()
                        .map(|(n, (id, node, online))| {
                            json!({"id": id, "numa_node": node, "thread": n, "online": online, "isolated": false})
                        })
                        .collect();
                    json!({"core": c.core, "die": 0, "cluster": 0, "frequency": c.frequency, "flags": c.flags, "threads": threads})
                })
                .collect();
            let cache: Vec<Value> = s
                .cache
                .iter()
                .map(|(level, kind, size)| json!({"level": level, "type": kind, "size": size}))
                .collect();
            json!({"name": s.name, "vendor": s.vendor, "socket": s.socket, "cache": cache, "cores": cores,
                "frequency": s.frequency, "frequency_minimum": 0, "frequency_turbo": 0, "address_sizes": null})
        })
        .collect();
    let nodes: Vec<Value> = r
        .memory
        .nodes
        .iter()
        .map(|(node, total, used)| json!({"numa_node": node, "total": total, "used": used, "hugepages_total": 0, "hugepages_used": 0}))
        .collect();
    let disks: Vec<Value> = r
        .disks
        .iter()
        .map(|d| {
            let partitions: Vec<Value> = d
                .partitions
                .iter()
                .map(|p| {
                    json!({"id": p.name, "device": p.device, "partition": p.number, "size": p.size, "read_only": p.read_only})
                })
                .collect();
            // Of disks that turn the kernel tells no speed: Incus says 1.
            json!({"id": d.name, "device": d.device, "type": d.kind, "model": d.model, "serial": secret(&d.serial),
                "read_only": d.read_only, "removable": d.removable, "rpm": u8::from(d.rotational), "size": d.size,
                "block_size": d.block_size, "partitions": partitions, "numa_node": 0})
        })
        .collect();
    let cards: Vec<Value> = r
        .network
        .iter()
        .map(|n| {
            let port = json!({"id": n.name, "address": secret(&n.mac), "port": 0, "protocol": "ethernet",
                "link_detected": n.link, "link_speed": n.speed, "link_duplex": n.duplex, "auto_negotiation": false});
            json!({"driver": n.driver, "pci_address": n.pci_address, "vendor_id": n.vendor_id, "product_id": n.product_id,
                "numa_node": 0, "ports": [port]})
        })
        .collect();
    let pci: Vec<Value> = r
        .pci
        .iter()
        .map(|d| {
            json!({"pci_address": d.address, "driver": d.driver, "driver_version": "", "vendor_id": d.vendor_id, "vendor": "",
                "product_id": d.product_id, "product": "", "numa_node": d.numa_node, "iommu_group": d.iommu_group.unwrap_or(0),
                "vpd": {}})
        })
        .collect();
    // A display controller is of class 3.
    let gpus: Vec<Value> = r
        .pci
        .iter()
        .filter(|d| d.class.starts_with("0x03"))
        .map(|d| {
            json!({"pci_address": d.address, "driver": d.driver, "vendor_id": d.vendor_id, "product_id": d.product_id,
                "numa_node": d.numa_node})
        })
        .collect();
    let usb: Vec<Value> = r
        .usb
        .iter()
        .map(|d| {
            json!({"bus_address": d.bus, "device_address": d.device, "vendor": d.vendor, "vendor_id": d.vendor_id,
                "product": d.product, "product_id": d.product_id, "serial": secret(&d.serial), "speed": d.speed, "interfaces": []})
        })
        .collect();
    let s = &r.system;
    let [firmware_vendor, firmware_version, firmware_date] = &s.firmware;
    let [board_vendor, board_product, board_version, board_serial] = &s.motherboard;
    let [chassis_vendor, chassis_version, chassis_serial] = &s.chassis;
    let known =
        |parts: &[String], value: Value| if parts.iter().all(String::is_empty) { Value::Null } else { value };
    sync(&json!({
        "cpu": {"architecture": architecture, "sockets": sockets, "total": threads},
        "memory": {"nodes": nodes, "total": r.memory.total, "used": r.memory.used,
            "hugepages_total": r.memory.hugepages_total, "hugepages_used": r.memory.hugepages_used,
            "hugepages_size": r.memory.hugepages_size},
        "gpu": {"cards": gpus, "total": gpus.len()},
        "network": {"cards": cards, "total": cards.len()},
        "storage": {"disks": disks, "total": disks.len()},
        "usb": {"devices": usb, "total": usb.len()},
        "pci": {"devices": pci, "total": pci.len()},
        "system": {
            "uuid": secret(&s.uuid), "vendor": s.vendor, "product": s.product, "family": s.family, "version": s.version,
            "sku": s.sku, "serial": secret(&s.serial), "type": s.kind,
            "firmware": known(&s.firmware, json!({"vendor": firmware_vendor, "version": firmware_version, "date": firmware_date})),
            "motherboard": known(&s.motherboard, json!({"vendor": board_vendor, "product": board_product,
                "version": board_version, "serial": secret(board_serial)})),
            "chassis": known(&s.chassis, json!({"vendor": chassis_vendor, "type": "", "version": chassis_version,
                "serial": secret(chassis_serial)})),
        },
        "load": {"Average1Min": r.load[0], "Average5Min": r.load[1], "Average10Min": r.load[2], "Processes": r.processes},
    }))
}
