//! Networks, ACLs, address sets and forwards by plain HTTP. Tests named in the table of paths stand here too.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::Server;
use hyper::Method;
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn networks_live_and_are_refused() {
    let s = Server::start().await;
    let body = json!({"config": {"ipv4.address": "10.221.8.1/24", "ipv6.address": "none"}, "description": "", "name": "n1", "type": ""});
    let created = s.post("/1.0/networks", body.clone()).await;
    assert_eq!((created.status, created.header("location")), (201, "/1.0/networks/n1"));
    s.post("/1.0/networks", body).await.refused(409);
    for (config, part) in [
        (json!({"ipv4.addres": "10.1.1.1/24"}), "ipv4.address"),
        (json!({"ipv4.address": "bad"}), "ipv4.address"),
        (json!({"ipv4.address": "10.221.8.1/24"}), "overlaps"),
    ] {
        let answer = s.post("/1.0/networks", json!({"name": "n2", "config": config})).await;
        assert!([400, 409].contains(&answer.status));
        assert!(answer.json()["error"].as_str().unwrap().contains(part));
    }
    s.post("/1.0/networks", json!({"name": "n2", "type": "ovn"})).await.refused(400);
    s.post("/1.0/networks", json!({"name": "much-too-long-for-a-bridge"})).await.refused(400);
    let got = s.get("/1.0/networks/n1").await;
    let tag = got.header("etag").to_owned();
    assert_eq!(
        (got.metadata()["type"].as_str(), got.metadata()["managed"].as_bool()),
        (Some("bridge"), Some(true))
    );
    let body =
        json!({"config": {"ipv4.address": "10.221.8.1/24", "user.a": "b"}, "description": "d"}).to_string();
    s.send(Method::PUT, "/1.0/networks/n1", &[("if-match", &tag)], body.clone()).await.metadata();
    s.send(Method::PUT, "/1.0/networks/n1", &[("if-match", &tag)], body).await.refused(412);
    s.patch("/1.0/networks/n1", json!({"config": {"ipv4.nat": "false"}})).await.metadata();
    let external = |text: &str| json!({"config": {"bridge.external_interfaces": text}});
    s.patch("/1.0/networks/n1", external("v5/granted0/5")).await.metadata();
    let wrong = s.patch("/1.0/networks/n1", external("v5/granted0")).await;
    assert!(wrong.refused(400).contains("NAME/PARENT/VLAN"));
    s.patch("/1.0/networks/n1", external("")).await.metadata();
    let config = s.get("/1.0/networks/n1").await.metadata()["config"].clone();
    assert_eq!((config["user.a"].as_str(), config["ipv4.nat"].as_str()), (Some("b"), Some("false")));
    let state = s.get("/1.0/networks/n1/state").await.metadata();
    assert_eq!(state["addresses"][0]["address"], "10.221.8.1");
    let leases = s.get("/1.0/networks/n1/leases").await.metadata();
    assert_eq!(
        (leases[0]["type"].as_str(), leases[0]["address"].as_str()),
        (Some("gateway"), Some("10.221.8.1"))
    );
    let all = json!({"config": {"ipv4.address": "10.221.8.1/24", "ipv4.dhcp.expiry": "2h", "ipv4.dhcp.gateway": "10.221.8.9",
        "ipv4.dhcp.routes": "10.9.0.0/16,10.221.8.9", "ipv4.dhcp.ranges": "10.221.8.10-10.221.8.20", "ipv4.nat": "true",
        "ipv4.nat.address": "192.0.2.7", "ipv4.nat.order": "after", "ipv4.routes": "10.222.0.0/16", "ipv4.firewall": "false",
        "ipv6.address": "fd42:221:8::1/64", "ipv6.ra": "true", "ipv6.dhcp.stateful": "true", "bridge.hwaddr": "10:66:6a:00:00:09",
        "bridge.multicast_snooping": "false", "dns.search": "a.example", "dns.nameservers": "192.0.2.53"}, "description": ""});
    s.put("/1.0/networks/n1", all).await.metadata();
    let lines = |text: &str| json!({"config": {"raw.dnsmasq": text}});
    let added = s.patch("/1.0/networks/n1", lines("address=/a.example/10.222.0.9")).await;
    assert!(added.refused(403).contains("policy"));
    let script = s.patch("/1.0/networks/n1", lines("dhcp-script=/bin/sh")).await;
    assert!(script.refused(400).contains("\"dhcp-script\" is none of the options"));
    assert_eq!(s.get("/1.0/networks/n1/leases").await.metadata()[1]["address"], "fd42:221:8::1");
    s.post("/1.0/networks/n1", json!({"name": "a/b"})).await.refused(400);
    let taken = s.get("/1.0/networks?recursion=1").await.metadata()[0]["name"].clone();
    s.post("/1.0/networks/n1", json!({"name": taken})).await.refused(409);
    s.post(&format!("/1.0/networks/{}", taken.as_str().unwrap()), json!({"name": "n7"})).await.refused(409);
    assert_eq!(
        s.post("/1.0/networks/n1", json!({"name": "n3"})).await.header("location"),
        "/1.0/networks/n3"
    );
    s.get("/1.0/networks/n1").await.refused(404);
    s.delete("/1.0/networks/n3").await.metadata();
    let used = s.get("/1.0/networks?recursion=1").await.metadata()[0].clone();
    assert_eq!(used["used_by"], json!(["/1.0/profiles/default"]));
    s.delete(&format!("/1.0/networks/{}", used["name"].as_str().unwrap())).await.refused(409);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn networks_are_started_and_stopped() {
    let s = Server::start().await;
    let body = json!({"name": "n1", "config": {"ipv4.address": "10.221.8.1/24", "ipv6.address": "none"}});
    assert_eq!(s.post("/1.0/networks", body).await.status, 201);
    let path = "/1.0/karst/networks/n1";
    let life = s.get(path).await.metadata();
    assert_eq!(
        life,
        json!({"name": "n1", "project": "default", "active": true, "autostart": true, "persistent": true, "running": null})
    );
    s.put(path, json!({"active": false})).await.metadata();
    assert_eq!(s.get("/1.0/networks/n1").await.metadata()["status"], "Unavailable");
    assert_eq!(s.get("/1.0/networks/n1/state").await.metadata()["state"], "down");
    s.put(path, json!({"active": false})).await.metadata();
    // Changed while it is stopped it is not made.
    s.patch("/1.0/networks/n1", json!({"config": {"ipv4.nat": "true"}})).await.metadata();
    assert_eq!(s.get(path).await.metadata()["active"], false);
    s.put(path, json!({"active": true, "autostart": false})).await.metadata();
    let life = s.get(path).await.metadata();
    assert_eq!((life["active"].as_bool(), life["autostart"].as_bool()), (Some(true), Some(false)));
    assert_eq!(s.get("/1.0/networks/n1").await.metadata()["status"], "Created");
    assert!(s.put(path, json!({})).await.refused(400).contains("active or autostart"));
    s.put(path, json!({"active": "yes"})).await.refused(400);
    s.put("/1.0/karst/networks/nonet", json!({"active": true})).await.refused(404);
    s.put(path, json!({"active": false})).await.metadata();
    s.delete("/1.0/networks/n1").await.metadata();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn network_acls_live() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let set =
        json!({"name": "office", "addresses": ["192.0.2.0/28", "198.51.100.1-198.51.100.9"], "config": null});
    assert_eq!(s.post("/1.0/network-address-sets", set.clone()).await.status, 201);
    s.post("/1.0/network-address-sets", set).await.refused(409);
    s.post("/1.0/network-address-sets", json!({"name": "x", "addresses": ["192.0.2.0/99"]}))
        .await
        .refused(400);
    let rule = json!({"action": "allow", "source": "$office", "protocol": "tcp", "destination_port": "22", "state": "logged"});
    let acl = json!({"name": "web", "description": "d", "ingress": [rule], "egress": null, "config": {"user.a": "b"}});
    let created = s.post("/1.0/network-acls", acl.clone()).await;
    assert_eq!((created.status, created.header("location")), (201, "/1.0/network-acls/web"));
    s.post("/1.0/network-acls", acl).await.refused(409);
    for (rule, part) in [
        (json!({"action": "maybe"}), "ingress[0].action"),
        (json!({"action": "allow", "source": "$nope"}), "nope"),
        (json!({"action": "allow", "source": "nope"}), "nope"),
        (json!({"action": "allow", "destination_port": "80"}), "destination_port"),
        (json!({"action": "allow", "sourc": "x"}), "source"),
    ] {
        let answer = s.post("/1.0/network-acls", json!({"name": "bad", "ingress": [rule]})).await;
        assert!([400, 404].contains(&answer.status), "{part}: {}", answer.status);
        assert!(
            answer.json()["error"].as_str().unwrap().contains(part),
            "{part}: {}",
            answer.json()["error"]
        );
    }
    let got = s.get("/1.0/network-acls/web").await;
    let tag = got.header("etag").to_owned();
    let web = got.metadata();
    assert_eq!(web["ingress"][0]["destination_port"], "22");
    assert!(web["ingress"][0].get("icmp_type").is_none() && web["egress"] == json!([]));
    let body = json!({"ingress": web["ingress"], "egress": [{"action": "allow-stateless", "destination": "@internal"}]});
    s.send(Method::PUT, "/1.0/network-acls/web", &[("if-match", &tag)], body.to_string()).await.metadata();
    s.send(Method::PUT, "/1.0/network-acls/web", &[("if-match", &tag)], body.to_string()).await.refused(412);
    s.patch("/1.0/network-acls/web", json!({"description": "e"})).await.metadata();
    let web = s.get("/1.0/network-acls?recursion=1").await.metadata()[0].clone();
    assert_eq!(
        (web["description"].as_str(), web["egress"][0]["state"].as_str()),
        (Some("e"), Some("enabled"))
    );
    let sets = s.get("/1.0/network-address-sets").await.metadata();
    assert_eq!(sets, json!(["/1.0/network-address-sets/office"]));
    let sets = s.get("/1.0/network-address-sets?recursion=1&filter=name+eq+office").await.metadata();
    assert_eq!(sets[0]["addresses"], json!(["192.0.2.0/28", "198.51.100.1-198.51.100.9"]));
    assert_eq!(
        s.get("/1.0/network-address-sets/office").await.metadata()["used_by"],
        json!(["/1.0/network-acls/web"])
    );
    s.delete("/1.0/network-address-sets/office").await.refused(409);
    s.put("/1.0/network-address-sets/office", json!({"addresses": ["192.0.2.0/28"], "description": "d"}))
        .await
        .metadata();
    s.patch("/1.0/network-address-sets/office", json!({"config": {"user.b": "c"}})).await.metadata();
    s.post("/1.0/network-address-sets/office", json!({"name": "other"})).await.refused(409);

    // On a NIC, and what that means for a packet.
    let network = s.get("/1.0/networks?recursion=1").await.metadata()[0]["name"].as_str().unwrap().to_owned();
    let own = s.get(&format!("/1.0/networks/{network}")).await.metadata()["config"]["ipv4.address"].clone();
    let address = own.as_str().and_then(|a| a.strip_suffix("1/24")).map(|a| format!("{a}9")).unwrap();
    let nic = |acls: &str| {
        let nic = json!({"type": "nic", "network": network, "ipv4.address": address, "security.acls": acls});
        json!({"devices": {"eth0": nic}})
    };
    let answer = s.patch("/1.0/instances/c1", nic("nope")).await;
    assert_eq!(answer.status, 404, "{}", answer.json());
    assert_eq!(s.patch("/1.0/instances/c1", nic("web")).await.status, 200);
    let web = s.get("/1.0/network-acls/web").await.metadata();
    assert_eq!(web["used_by"], json!(["/1.0/instances/c1"]));
    s.delete("/1.0/network-acls/web").await.refused(409);
    s.post("/1.0/network-acls/web", json!({"name": "web2"})).await.refused(409);
    // What its rule logged, a line of JSON each, as the file itself.
    let log = s.get("/1.0/network-acls/web/log").await;
    assert_eq!((log.status, log.header("content-type")), (200, "application/octet-stream"));
    let line: serde_json::Value = serde_json::from_slice(&log.body).unwrap();
    assert_eq!(
        (&line["action"], &line["direction"], &line["rule"]),
        (&json!("allow"), &json!("ingress"), &json!(0))
    );
    s.get("/1.0/network-acls/none/log").await.refused(404);
    let ask = |to: &str, port: &str| format!("/1.0/karst/network/explain?from=192.0.2.3&to={to}&port={port}");
    let answer = s.get(&ask("c1", "22")).await.metadata();
    let last = &answer["steps"][0];
    assert_eq!((&answer["passes"], &last["by"], &last["acl"]), (&json!(true), &json!("rule"), &json!("web")));
    let answer = s.get(&ask("c1", "tcp/80")).await.metadata();
    assert_eq!((&answer["passes"], &answer["steps"][0]["by"]), (&json!(false), &json!("default")));
    s.get(&ask("c9", "80")).await.refused(404);
    s.get(&ask("c1", "http")).await.refused(400);
    let refused =
        s.patch(&format!("/1.0/networks/{network}"), json!({"config": {"security.acls": "nope"}})).await;
    assert_eq!(refused.status, 404);
    s.patch(&format!("/1.0/networks/{network}"), json!({"config": {"security.acls": "web"}}))
        .await
        .metadata();
    s.patch(&format!("/1.0/networks/{network}"), json!({"config": {"security.acls": ""}})).await.metadata();
    assert_eq!(s.patch("/1.0/instances/c1", nic("")).await.status, 200);
    assert_eq!(s.post("/1.0/network-acls/web", json!({"name": "web2"})).await.status, 201);
    s.delete("/1.0/network-acls/web2").await.metadata();
    s.post("/1.0/network-address-sets/office", json!({"name": "other"})).await;
    s.delete("/1.0/network-address-sets/other").await.metadata();
    assert_eq!(s.get("/1.0/network-acls").await.metadata(), json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forwards_live() {
    let s = Server::start().await;
    let config = json!({"ipv4.address": "10.221.8.1/24", "ipv6.address": "fd42:221:8::1/64"});
    s.post("/1.0/networks", json!({"name": "n1", "config": config})).await;
    let all = "/1.0/networks/n1/forwards";
    let port = json!({"protocol": "tcp", "listen_port": "80,443", "target_address": "10.221.8.5", "description": "web"});
    let forward =
        json!({"listen_address": "192.0.2.9", "ports": [port], "config": {"target_address": "10.221.8.6"}});
    let created = s.post(all, forward.clone()).await;
    assert_eq!((created.status, created.header("location")), (201, "/1.0/networks/n1/forwards/192.0.2.9"));
    s.post(all, forward).await.refused(409);
    for (body, part) in [
        (json!({"listen_address": "x"}), "listen_address"),
        (json!({"listen_address": "10.221.8.77"}), "listen_address"),
        (
            json!({"listen_address": "192.0.2.8", "config": {"target_address": "10.9.9.9"}}),
            "config.target_address",
        ),
        (
            json!({"listen_address": "2001:db8::9", "config": {"target_address": "10.221.8.5"}}),
            "config.target_address",
        ),
        (
            json!({"listen_address": "192.0.2.8", "ports": [{"protocol": "tcp", "listen_port": "0",
            "target_address": "10.221.8.5"}]}),
            "ports[0].listen_port",
        ),
    ] {
        assert!(s.post(all, body).await.refused(400).contains(part), "{part}");
    }
    assert_eq!(s.post(all, json!({"listen_address": "2001:db8::9"})).await.status, 201);
    let got = s.get("/1.0/networks/n1/forwards/192.0.2.9").await;
    let tag = got.header("etag").to_owned();
    assert_eq!(got.metadata()["ports"][0]["listen_port"], "80,443");
    s.patch("/1.0/networks/n1/forwards/192.0.2.9", json!({"description": "d"})).await.metadata();
    let put = json!({"ports": [], "config": {}}).to_string();
    s.send(Method::PUT, "/1.0/networks/n1/forwards/192.0.2.9", &[("if-match", &tag)], put.clone())
        .await
        .refused(412);
    s.send(Method::PUT, "/1.0/networks/n1/forwards/192.0.2.9", &[], put).await.metadata();
    let listed = s.get(&format!("{all}?recursion=1")).await.metadata();
    assert_eq!((listed.as_array().unwrap().len(), &listed[0]["ports"]), (2, &json!([])));
    s.delete("/1.0/networks/n1/forwards/192.0.2.9").await.metadata();
    s.get("/1.0/networks/n1/forwards/192.0.2.9").await.refused(404);
    // A network goes with its forwards.
    s.delete("/1.0/networks/n1").await.metadata();
    let config = json!({"ipv4.address": "10.221.8.1/24", "ipv6.address": "none"});
    s.post("/1.0/networks", json!({"name": "n1", "config": config})).await;
    assert_eq!(s.get(all).await.metadata(), json!([]));
    assert_eq!(s.post(all, json!({"listen_address": "192.0.2.9"})).await.status, 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allocations_are_listed() {
    let s = Server::start().await;
    let body = json!({"name": "n1", "config": {"ipv4.address": "10.221.8.1/24", "ipv6.address": "none", "ipv4.nat": "true"}});
    assert_eq!(s.post("/1.0/networks", body).await.status, 201);
    assert_eq!(
        s.post("/1.0/networks/n1/forwards", json!({"listen_address": "192.0.2.50"})).await.status,
        201
    );
    let all = s.get("/1.0/network-allocations").await.metadata();
    let of = |kind: &str| {
        let all = all.as_array().unwrap().iter();
        all.filter(|a| a["type"] == kind && a["network"] == "n1").cloned().collect::<Vec<_>>()
    };
    let own = of("network");
    assert_eq!((&own[0]["addresses"], &own[0]["nat"]), (&json!("10.221.8.1/24"), &json!(true)));
    assert_eq!(own[0]["used_by"], "/1.0/networks/n1");
    assert_eq!(of("network-forward")[0]["addresses"], "192.0.2.50/32");
    s.get("/1.0/network-allocations?project=nothing").await.refused(404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn projects_have_networks_of_their_own() {
    let s = Server::start().await;
    let shared = s.get("/1.0/networks").await.metadata();
    for project in ["acme", "beta"] {
        let body = json!({"name": project, "config": {"features.networks": "true"}});
        assert_eq!(s.post("/1.0/projects", body).await.status, 201);
        let path = format!("/1.0/networks/lan?project={project}");
        let created = s.post(&format!("/1.0/networks?project={project}"), json!({"name": "lan"})).await;
        assert_eq!((created.status, created.header("location")), (201, &*path));
        assert_eq!(s.get(&format!("/1.0/networks?project={project}")).await.metadata(), json!([path]));
        let project_now = s.get(&format!("/1.0/projects/{project}")).await.metadata();
        assert!(project_now["used_by"].as_array().unwrap().contains(&json!(path)), "{project_now}");
    }
    assert_eq!(s.get("/1.0/networks").await.metadata(), shared);
    s.get("/1.0/networks/lan").await.refused(404);
    let first = shared[0].as_str().unwrap();
    s.get(&format!("{first}?project=beta")).await.refused(404);
    s.get(&format!("{first}/leases?project=beta")).await.refused(404);
    let body = json!({"name": "g", "source": {"type": "none"}, "devices": {
        "root": {"type": "disk", "path": "/", "pool": "default"}, "eth0": {"type": "nic", "network": "lan"}}});
    s.done(s.post("/1.0/instances?project=beta", body).await).await;
    let lan = s.get("/1.0/networks/lan?project=beta").await.metadata();
    assert_eq!(
        (&lan["project"], &lan["used_by"]),
        (&json!("beta"), &json!(["/1.0/instances/g?project=beta"]))
    );
    assert_eq!(s.get("/1.0/networks/lan?project=acme").await.metadata()["used_by"], json!([]));
    s.delete("/1.0/networks/lan?project=beta").await.refused(409);
    s.patch("/1.0/networks/lan?project=acme", json!({"config": {"user.a": "b"}})).await.metadata();
    assert!(s.get("/1.0/networks/lan?project=beta").await.metadata()["config"].get("user.a").is_none());
    assert_eq!(s.post("/1.0/network-acls?project=acme", json!({"name": "web"})).await.status, 201);
    assert_eq!(s.get("/1.0/network-acls").await.metadata(), json!([]));
    assert_eq!(
        s.get("/1.0/network-acls?project=acme").await.metadata(),
        json!(["/1.0/network-acls/web?project=acme"])
    );
    let renamed = s.post("/1.0/networks/lan?project=acme", json!({"name": "wan"})).await;
    assert_eq!((renamed.status, renamed.header("location")), (201, "/1.0/networks/wan?project=acme"));
    s.delete("/1.0/networks/wan?project=acme").await.metadata();
    s.delete("/1.0/projects/acme").await.refused(409);
    s.delete("/1.0/network-acls/web?project=acme").await.metadata();
    s.delete("/1.0/projects/acme").await.metadata();
    for key in ["features.networks.zones", "restricted.networks.uplinks"] {
        let said = s.post("/1.0/projects", json!({"name": "zoned", "config": {key: "true"}})).await;
        assert!(said.refused(400).contains(key));
    }
}
