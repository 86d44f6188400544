//! What documents of libvirt's own were refused for once: each such part comes to keys, is shown as it was written, and defines the
//! same again; what of it is not done is refused by its name.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, dump, ready},
    support::{Client, Server},
};
use karst_engine::Context;
use karst_frontend_libvirt::error::Code;
use karst_model::access::Principal;

/// A machine of nothing but what is asked about.
fn machine(parts: &str, devices: &str) -> String {
    let vcpu = if parts.contains("<vcpu") { "" } else { "<vcpu placement='static'>2</vcpu>" };
    let os = if parts.contains("<os") { "" } else { "<os><type arch='x86_64' machine='pc'>hvm</type></os>" };
    format!(
        "<domain type='kvm'><name>v1</name><memory unit='MiB'>128</memory>{vcpu}{parts}{os}<devices>{devices}</devices></domain>"
    )
}

fn key(server: &Server, name: &str) -> Option<String> {
    let view = server.engine.instance(&Context::new(Principal::system()), "default", "v1").unwrap();
    view.expanded_config.get(name).filter(|v| !v.is_empty()).cloned()
}

/// Defines it, and what is shown of it, which stays as it is.
async fn kept(client: &mut Client, text: &str) -> String {
    define(client, text).await.unwrap_or_else(|e| panic!("{e:?}: {text}"));
    let shown = dump(client, "v1", 2).await;
    define(client, &shown).await.unwrap_or_else(|e| panic!("{e:?}: {shown}"));
    assert_eq!(dump(client, "v1", 2).await, shown);
    shown
}

async fn gone(client: &mut Client) {
    let domain = client.domain("v1").await;
    client.call(231, &[&domain[..], &0u32.to_be_bytes()].concat()).await.unwrap();
}

/// Whole parts of a domain: the part, the keys that it comes to, and what is shown of it.
const PARTS: &[(&str, &[(&str, &str)], &str)] = &[
    (
        "<idmap><uid start='0' target='1000' count='10'/></idmap>",
        &[],
        "<uid start='0' target='1000' count='10'/>",
    ),
    ("<seclabel type='none'/>", &[], "<seclabel type='none'/>"),
    (
        "<memoryBacking><hugepages><page size='4' unit='KiB'/></hugepages></memoryBacking>",
        &[],
        "<page size='4' unit='KiB'/>",
    ),
    (
        "<vcpu placement='auto'>2</vcpu><numatune><memory mode='interleave' placement='auto'/></numatune>",
        &[("hardware.numa.placement", "both"), ("hardware.numa.policy", "interleave")],
        "<memory mode='interleave' placement='auto'/>",
    ),
    (
        "<vcpu placement='auto'>2</vcpu>",
        &[("hardware.numa.placement", "both")],
        "<vcpu placement='auto'>2</vcpu>",
    ),
    (
        "<vcpu placement='auto'>2</vcpu><numatune><memory mode='preferred' nodeset='0'/></numatune>",
        &[
            ("hardware.numa.placement", "cpu"),
            ("hardware.numa.policy", "preferred"),
            ("limits.memory.nodes", "0"),
        ],
        "<memory mode='preferred' nodeset='0'/>",
    ),
    (
        "<vcpu placement='static' cpuset='0'>1</vcpu><numatune><memory mode='strict' placement='auto' nodeset='7'/></numatune>",
        &[("hardware.numa.placement", "memory"), ("limits.cpu", "0-0")],
        "<memory mode='strict' placement='auto' nodeset='7'/>",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_a_domain_come_to_keys_and_are_shown() {
    let (server, mut client) = ready().await;
    for (part, keys, line) in PARTS {
        let shown = kept(&mut client, &machine(part, "")).await;
        for (name, value) in *keys {
            assert_eq!(key(&server, name).as_deref(), Some(*value), "{name} of {part}");
        }
        assert!(shown.contains(line), "{line} in {shown}");
        // Without it nothing of it is left.
        define(&mut client, &machine("", "")).await.unwrap();
        for (name, _) in keys.iter().filter(|(name, _)| *name != "limits.cpu") {
            assert_eq!(key(&server, name), None, "{name} after {part}");
        }
        gone(&mut client).await;
    }
}

/// What is still not done, by the word that names it.
const REFUSED: &[(&str, &str, &str)] = &[
    ("<seclabel type='none' model='dac'/>", "", "seclabel"),
    ("<numatune><memory mode='near' nodeset='0'/></numatune>", "", "numatune mode"),
    ("<numatune><memory placement='near'/></numatune>", "", "numatune placement"),
    ("<vcpu placement='near'>1</vcpu>", "", "vcpu"),
    (
        "<memoryBacking><hugepages><page size='4' unit='KiB' nodeset='0'/></hugepages></memoryBacking>",
        "",
        "memoryBacking",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rest_is_refused_by_its_name() {
    let (_server, mut client) = ready().await;
    for (part, devices, word) in REFUSED {
        let refused = define(&mut client, &machine(part, devices)).await.unwrap_err();
        assert_eq!(refused.0, Code::ConfigUnsupported as i32, "{part}{devices}: {refused:?}");
        assert!(refused.1.contains(word), "{part}{devices}: {refused:?}");
    }
}
