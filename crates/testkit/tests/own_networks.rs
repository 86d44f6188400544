//! Projects with networks of their own: names, interfaces, ACLs and guests of one are nothing to another.

use karst_engine::{
    Context, LiveOperation,
    compute::create::CreateInstance,
    firewall::{UpdateAcl, UpdateAddressSet, UpdateForward},
    network::{CreateNetwork, UpdateNetwork},
    tenancy::UpdateProfile,
};
use karst_env::SeededEnv;
use karst_model::{
    Config, Error, ErrorKind, NetworkId, PrincipalId, Result,
    access::{Grant, Identity, Permission, Principal, Role},
    device::Devices,
    firewall::AclRule,
    spec::NicLink,
    uplink::NetworkKind,
};
use karst_testkit::{World, scenarios::container};

const OWN: &[(&str, &str)] = &[("features.networks", "true")];

fn config(pairs: &[(&str, &str)]) -> Config {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

/// A project with networks of its own, whose default profile has a root disk alone.
async fn project(w: &World, name: &str, keys: &[(&str, &str)]) {
    let mut all = config(OWN);
    all.extend(config(keys));
    w.engine.project_create(&w.admin, name, "", all).await.unwrap();
    let root = config(&[("type", "disk"), ("path", "/"), ("pool", "default")]);
    let update = UpdateProfile { devices: Devices::from([("root".into(), root)]), ..Default::default() };
    w.engine.profile_update(&w.admin, name, "default", update).await.unwrap();
}

async fn done(w: &World, operation: Result<LiveOperation>) -> Result<()> {
    w.ended(operation?).await.error.clone().map_or(Ok(()), Err)
}

async fn make(w: &World, context: &Context, project: &str, name: &str, keys: &[(&str, &str)]) -> Result<()> {
    let request = CreateNetwork { name: name.into(), config: config(keys), ..Default::default() };
    done(w, w.engine.network_create(context, project, request).await.map(|(_, operation)| operation)).await
}

async fn change(
    w: &World,
    context: &Context,
    project: &str,
    name: &str,
    keys: &[(&str, &str)],
) -> Result<()> {
    let mut all = w.engine.network(&w.admin, project, name)?.config.clone();
    all.extend(config(keys));
    let request = UpdateNetwork { description: String::new(), config: all, if_version: None };
    done(w, w.engine.network_update(context, project, name, request).await).await
}

fn with_nic(name: &str, keys: &[(&str, &str)]) -> CreateInstance {
    let mut nic = config(&[("type", "nic")]);
    nic.extend(config(keys));
    CreateInstance { start: true, devices: Devices::from([("eth0".into(), nic)]), ..container(name) }
}

async fn create(w: &World, project: &str, request: CreateInstance) -> Result<()> {
    let made = w.engine.instance_create(&w.admin, project, request).await;
    done(w, made.map(|(_, operation)| operation)).await
}

fn somebody(w: &World, project: &str) -> Context {
    let id = w.engine.project(&w.admin, project, Permission::ProjectView).unwrap().id;
    let grants = vec![Grant { role: Role::Operator, project: Some(id) }];
    let identity = Identity::Token { name: "tenant".into(), address: String::new() };
    Context::new(Principal::of(PrincipalId(uuid::Uuid::from_u128(99)), identity, grants))
}

#[track_caller]
fn refused<T>(result: Result<T>, kind: ErrorKind, says: &str) -> Error {
    let e = result.err().expect(says);
    assert_eq!(e.kind, kind, "{e}");
    assert!(e.to_string().contains(says), "{e}");
    e
}

fn names(w: &World, context: &Context, project: &str) -> Vec<String> {
    w.engine.networks(context, project).unwrap().iter().map(|n| n.name.to_string()).collect()
}

fn id(w: &World, project: &str, name: &str) -> NetworkId {
    w.engine.network(&w.admin, project, name).unwrap().id
}

/// The network that the guest's one NIC is on.
fn is_on(w: &World, project: &str, name: &str) -> NicLink {
    let instance = w.engine.instance(&w.admin, project, name).unwrap().instance.id;
    w.agent.guest_spec(instance).expect("it runs").nics[0].link.clone()
}

#[test]
fn names_are_the_projects_and_interfaces_the_hosts() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        for name in ["acme", "beta"] {
            project(&w, name, &[]).await;
            make(&w, c, name, "lan", &[]).await.unwrap();
        }
        refused(make(&w, c, "acme", "lan", &[]).await, ErrorKind::Conflict, "exists already");
        assert_eq!(
            (names(&w, c, "acme"), names(&w, c, "default")),
            (vec!["lan".into()], vec!["karstbr0".into()])
        );
        let bridge = |project: &str, name: &str| {
            let spec = w.agent.network_spec(id(&w, project, name)).expect("it is on the host");
            assert_eq!(spec.bridge, e.network(c, project, name).unwrap().interface());
            spec.bridge
        };
        assert_eq!(bridge("acme", "lan"), "lan", "it was free");
        let derived = bridge("beta", "lan");
        assert!(derived.starts_with("karst") && derived.len() <= 15, "{derived}");
        // What the host, or the default project, has already.
        make(&w, c, "acme", "docker0", &[]).await.unwrap();
        make(&w, c, "acme", "karstbr0", &[]).await.unwrap();
        assert!(bridge("acme", "docker0").starts_with("karst") && bridge("acme", "karstbr0") != "karstbr0");
        refused(make(&w, c, "default", "lan", &[]).await, ErrorKind::Conflict, "another project");
        // The host is told whose alone they are.
        let owner = |project: &str, name: &str| w.agent.network_spec(id(&w, project, name)).unwrap().owner;
        let project_id = |name: &str| e.project(c, name, Permission::ProjectView).unwrap().id;
        assert_eq!(owner("acme", "lan"), Some(project_id("acme")));
        assert_eq!(owner("beta", "lan"), Some(project_id("beta")));
        assert_eq!(owner("default", "karstbr0"), None);
        // Subnets are the host's; of another project's network no more is said than that it is there.
        let taken = e.network(c, "acme", "lan").unwrap().config["ipv4.address"].clone();
        let said = refused(
            make(&w, c, "beta", "second", &[("ipv4.address", &taken)]).await,
            ErrorKind::Conflict,
            "overlaps with a network of another project",
        );
        assert!(!said.message.contains("\"lan\""), "{said}");
        // A new name leaves the interface, an old one is free again.
        done(&w, e.network_rename(c, "acme", "lan", "wan").await).await.unwrap();
        assert_eq!(bridge("acme", "wan"), "lan");
        make(&w, c, "acme", "lan", &[]).await.unwrap();
        assert!(bridge("acme", "lan").starts_with("karst"));
        for name in ["lan", "wan", "docker0", "karstbr0"] {
            done(&w, e.network_delete(c, "acme", name).await).await.unwrap();
        }
        assert_eq!(names(&w, c, "acme"), [""; 0]);
        make(&w, c, "default", "lan", &[]).await.expect("nobody has it any more");
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn guests_are_on_the_networks_of_their_project() {
    SeededEnv::run(2, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        for name in ["acme", "beta"] {
            project(&w, name, &[]).await;
            make(&w, c, name, "lan", &[]).await.unwrap();
            create(&w, name, with_nic("web", &[("network", "lan")])).await.unwrap();
            assert_eq!(is_on(&w, name, "web"), NicLink::Network(id(&w, name, "lan")));
        }
        create(&w, "default", container("web")).await.unwrap();
        // One guest each, under the same name and network name.
        for name in ["acme", "beta"] {
            let hosts = w.agent.network_hosts(id(&w, name, "lan"));
            assert_eq!(hosts.iter().map(|h| h.hostname.as_str()).collect::<Vec<_>>(), ["web"], "{name}");
            assert!(hosts[0].view.is_none(), "its names are the network's own");
            let network = e.network(c, name, "lan").unwrap();
            assert_eq!(e.network_used_by(c, &network), [format!("/1.0/instances/web?project={name}")]);
        }
        // What belongs to others is not there, under whatever name.
        for network in ["karstbr0", "wan"] {
            let nic = with_nic("x", &[("network", network)]);
            let e1 = refused(create(&w, "acme", nic).await, ErrorKind::NotFound, network);
            assert_eq!(e1.field.as_deref(), Some("devices.eth0.network"));
        }
        refused(
            create(&w, "default", with_nic("x", &[("network", "lan")])).await,
            ErrorKind::NotFound,
            "lan",
        );
        // Nor by the names that they have on the host.
        let theirs = e.network(c, "beta", "lan").unwrap().interface().to_owned();
        for (project, interface) in [("acme", "karstbr0"), ("acme", &*theirs), ("default", &*theirs)] {
            let nic = with_nic("x", &[("nictype", "bridged"), ("parent", interface)]);
            let e1 = refused(create(&w, project, nic).await, ErrorKind::Forbidden, interface);
            assert_eq!(e1.field.as_deref(), Some("devices.eth0.parent"), "{project}");
        }
        // Its own bridge is the network, however it is named.
        create(&w, "beta", with_nic("other", &[("nictype", "bridged"), ("parent", &theirs)])).await.unwrap();
        assert_eq!(is_on(&w, "beta", "other"), NicLink::Network(id(&w, "beta", "lan")));
        // Addresses are compared on one network, and not across two of one name.
        let address = |project: &str| {
            let subnet = e.network(c, project, "lan").unwrap().bridge().unwrap().ipv4.unwrap();
            std::net::Ipv4Addr::from(u32::from(subnet.network()) + 77).to_string()
        };
        let fixed =
            |name: &str, address: &str| with_nic(name, &[("network", "lan"), ("ipv4.address", address)]);
        create(&w, "acme", fixed("one", &address("acme"))).await.unwrap();
        let twice = create(&w, "acme", fixed("two", &address("acme"))).await;
        refused(twice, ErrorKind::Conflict, "by instance \"one\"");
        refused(
            create(&w, "beta", fixed("two", &address("acme"))).await,
            ErrorKind::Invalid,
            "not an address",
        );
        // Used, they stay; and a project with networks keeps what it has of its own.
        for name in ["acme", "beta"] {
            let gone = done(&w, e.network_delete(c, name, "lan").await).await;
            refused(gone, ErrorKind::Conflict, "is used by /1.0/instances");
            let mut all = e.project(c, name, Permission::ProjectView).unwrap().config.clone();
            all.insert("features.networks".into(), "false".into());
            refused(e.project_update(c, name, "", all, None).await, ErrorKind::Conflict, "not empty");
        }
        // Everything again as the host is told after a restart of control.
        let mut w = w;
        let before = w.agent.network_spec(id(&w, "beta", "lan")).unwrap();
        w.reopen().await.unwrap();
        w.settle().await;
        assert_eq!(w.agent.network_spec(id(&w, "beta", "lan")).unwrap(), before);
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn rules_follow_the_project_of_their_network() {
    SeededEnv::run(3, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        let rule = |action: &str| AclRule {
            action: action.into(),
            source: "$office".into(),
            state: "enabled".into(),
            ..Default::default()
        };
        let set = |address: &str| UpdateAddressSet { addresses: vec![address.into()], ..Default::default() };
        for (name, address, action) in [
            ("acme", "192.0.2.1", "drop"),
            ("default", "192.0.2.2", "allow"),
            ("beta", "192.0.2.3", "reject"),
        ] {
            if name != "default" {
                project(&w, name, &[]).await;
                make(&w, c, name, "lan", &[]).await.unwrap();
            }
            e.address_set_create(c, name, "office", set(address)).await.unwrap();
            let acl = UpdateAcl { ingress: vec![rule(action)], ..Default::default() };
            e.acl_create(c, name, "web", acl).await.unwrap();
        }
        change(&w, c, "acme", "lan", &[("security.acls", "web")]).await.unwrap();
        create(&w, "beta", with_nic("g", &[("network", "lan"), ("security.acls", "web")])).await.unwrap();
        let told = |project: &str| {
            let spec = w.agent.network_spec(id(&w, project, "lan")).unwrap();
            let acls: Vec<_> = spec.acls.iter().map(|a| (a.id, a.ingress[0].action.as_str())).collect();
            (acls, spec.sets.iter().map(|s| s.ranges[0].to_string()).collect::<Vec<_>>())
        };
        let acl = |project: &str| e.acl(c, project, "web").unwrap().id;
        assert_eq!(told("acme"), (vec![(acl("acme"), "drop")], vec!["192.0.2.1".to_owned()]));
        assert_eq!(told("beta"), (vec![(acl("beta"), "reject")], vec!["192.0.2.3".to_owned()]));
        // A change reaches the networks of its project.
        e.address_set_update(c, "beta", "office", set("192.0.2.33")).await.unwrap();
        assert_eq!((told("acme").1, told("beta").1), (vec!["192.0.2.1".into()], vec!["192.0.2.33".into()]));
        // What is used of one project is unused in another.
        let used = |project: &str| e.acl_used_by(c, &e.acl(c, project, "web").unwrap());
        assert_eq!(used("acme"), ["/1.0/networks/lan?project=acme"]);
        assert_eq!(used("beta"), ["/1.0/instances/g?project=beta"]);
        assert_eq!(used("default"), [""; 0]);
        refused(e.acl_delete(c, "beta", "web").await, ErrorKind::Conflict, "used by");
        e.acl_delete(c, "default", "web").await.unwrap();
        refused(
            change(&w, c, "default", "karstbr0", &[("security.acls", "web")]).await,
            ErrorKind::NotFound,
            "web",
        );
        let set_used = e.address_set_used_by(c, &e.address_set(c, "acme", "office").unwrap());
        assert_eq!(set_used, ["/1.0/network-acls/web?project=acme"]);
        e.acl_rename(c, "default", "web", "x").await.expect_err("it is gone");
        // A project is not empty while it has rules of its own.
        e.project_create(c, "rules", "", config(OWN)).await.unwrap();
        e.address_set_create(c, "rules", "office", set("192.0.2.9")).await.unwrap();
        refused(e.project_delete(c, "rules").await, ErrorKind::Conflict, "not empty");
        let all = config(&[("features.networks", "false")]);
        refused(e.project_update(c, "rules", "", all, None).await, ErrorKind::Conflict, "not empty");
        e.address_set_delete(c, "rules", "office").await.unwrap();
        e.project_delete(c, "rules").await.unwrap();
        // Forwards are found by their network, and their addresses are the host's.
        let forward = || UpdateForward::default();
        e.forward_create(c, "acme", "lan", "198.51.100.7", forward()).await.unwrap();
        let said = e.forward_create(c, "beta", "lan", "198.51.100.7", forward()).await;
        let said = refused(said, ErrorKind::Conflict, "a network of another project");
        assert_eq!(said.field.as_deref(), Some("listen_address"));
        assert_eq!(w.agent.network_spec(id(&w, "acme", "lan")).unwrap().forwards.len(), 1);
        assert_eq!(e.forwards(c, "beta", "lan").await.unwrap().len(), 0);
        done(&w, e.network_delete(c, "acme", "lan").await).await.unwrap();
        e.forward_create(c, "beta", "lan", "198.51.100.7", forward())
            .await
            .expect("it went with its network");
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

/// Every change of what a project has of its own, of networks called `lan`, ACLs `web` and address sets `office`, and every look.
async fn everything(w: &World, c: &Context, p: &str) -> [Vec<(&'static str, Result<()>)>; 2] {
    let e = &w.engine;
    let network = UpdateNetwork { description: "x".into(), config: Config::new(), if_version: None };
    let (acl, set, forward) = (UpdateAcl::default, UpdateAddressSet::default, UpdateForward::default);
    let changes = vec![
        ("network_create", e.network_create(c, p, CreateNetwork::automatic("fresh")).await.map(drop)),
        ("network_update", e.network_update(c, p, "lan", network).await.map(drop)),
        ("network_rename", e.network_rename(c, p, "lan", "wan").await.map(drop)),
        ("network_delete", e.network_delete(c, p, "lan").await.map(drop)),
        ("acl_create", e.acl_create(c, p, "fresh", acl()).await),
        ("acl_update", e.acl_update(c, p, "web", acl()).await),
        ("acl_rename", e.acl_rename(c, p, "web", "web2").await),
        ("acl_delete", e.acl_delete(c, p, "web").await),
        ("address_set_create", e.address_set_create(c, p, "fresh", set()).await),
        ("address_set_update", e.address_set_update(c, p, "office", set()).await),
        ("address_set_rename", e.address_set_rename(c, p, "office", "home").await),
        ("address_set_delete", e.address_set_delete(c, p, "office").await),
        ("forward_create", e.forward_create(c, p, "lan", "198.51.100.8", forward()).await),
        ("forward_update", e.forward_update(c, p, "lan", "198.51.100.7", forward()).await),
        ("forward_delete", e.forward_delete(c, p, "lan", "198.51.100.7").await),
    ];
    let looks = vec![
        ("networks", e.networks(c, p).map(drop)),
        ("network", e.network(c, p, "lan").map(drop)),
        ("network_state", e.network_state(c, p, "lan").await.map(drop)),
        ("network_leases", e.network_leases(c, p, "lan").await.map(drop)),
        ("acls", e.acls(c, p).map(drop)),
        ("acl", e.acl(c, p, "web").map(drop)),
        ("address_sets", e.address_sets(c, p).map(drop)),
        ("address_set", e.address_set(c, p, "office").map(drop)),
        ("forwards", e.forwards(c, p, "lan").await.map(drop)),
        ("forward", e.forward(c, p, "lan", "198.51.100.7").await.map(drop)),
    ];
    [changes, looks]
}

fn who(w: &World, role: Role, project: Option<&str>) -> Context {
    let id = project.map(|p| w.engine.project(&w.admin, p, Permission::ProjectView).unwrap().id);
    let identity = Identity::Token { name: "somebody".into(), address: String::new() };
    let grants = vec![Grant { role, project: id }];
    Context::new(Principal::of(PrincipalId(uuid::Uuid::from_u128(97)), identity, grants))
}

#[test]
fn each_role_has_its_part_of_a_projects_networks_and_strangers_none() {
    SeededEnv::run(5, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        for name in ["acme", "beta"] {
            project(&w, name, &[]).await;
            make(&w, c, name, "lan", &[]).await.unwrap();
            e.acl_create(c, name, "web", UpdateAcl::default()).await.unwrap();
            let set = UpdateAddressSet { addresses: vec!["192.0.2.1".into()], ..Default::default() };
            e.address_set_create(c, name, "office", set).await.unwrap();
        }
        e.forward_create(c, "acme", "lan", "198.51.100.7", UpdateForward::default()).await.unwrap();
        let before = w.fingerprint();
        let kind = |result: &Result<()>| result.as_ref().err().map(|e| e.kind);
        for (context, change, look) in [
            (
                Context::new(Principal::anonymous()),
                ErrorKind::Unauthenticated,
                Some(ErrorKind::Unauthenticated),
            ),
            (who(&w, Role::Operator, Some("beta")), ErrorKind::NotFound, Some(ErrorKind::NotFound)),
            (who(&w, Role::Operator, Some("default")), ErrorKind::NotFound, Some(ErrorKind::NotFound)),
            (who(&w, Role::Viewer, Some("acme")), ErrorKind::Forbidden, None),
            (who(&w, Role::User, Some("acme")), ErrorKind::Forbidden, None),
            (who(&w, Role::Viewer, None), ErrorKind::Forbidden, None),
        ] {
            let [changes, looks] = everything(&w, &context, "acme").await;
            let by = context.principal().identity.describe();
            for (name, result) in &changes {
                assert_eq!(kind(result), Some(change), "{name} by {by} {:?}", context.principal().grants);
            }
            for (name, result) in &looks {
                assert_eq!(kind(result), look, "{name} by {by} {:?}", context.principal().grants);
            }
        }
        assert_eq!(w.fingerprint(), before);
        w.engine.close();
    });
}

#[test]
fn who_may_change_a_project_has_its_networks_but_not_the_host() {
    SeededEnv::run(4, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        project(&w, "acme", &[("restricted", "true"), ("limits.networks", "2")]).await;
        project(&w, "beta", &[]).await;
        make(&w, c, "beta", "theirs", &[]).await.unwrap();
        let tenant = somebody(&w, "acme");
        make(&w, &tenant, "acme", "lan", &[("dns.domain", "acme.example")]).await.unwrap();
        assert_eq!(names(&w, &tenant, "acme"), ["lan"]);
        // What interfaces of the host are called is not his to say, though the name is free.
        let interface = e.network(c, "acme", "lan").unwrap().interface().to_owned();
        assert!(interface.starts_with("karst") && interface.len() > 5, "{interface}");
        assert_eq!(w.agent.network_spec(id(&w, "acme", "lan")).unwrap().bridge, interface);
        for name in ["theirs", "karstbr0", "nowhere"] {
            let said = refused(e.network(&tenant, "acme", name), ErrorKind::NotFound, "not found");
            assert_eq!(said.message.replace(name, "X"), "network \"X\" not found");
            refused(e.network_state(&tenant, "acme", name).await, ErrorKind::NotFound, "not found");
            refused(e.network_leases(&tenant, "acme", name).await, ErrorKind::NotFound, "not found");
            refused(e.forwards(&tenant, "acme", name).await, ErrorKind::NotFound, "not found");
        }
        refused(e.networks(&tenant, "beta"), ErrorKind::NotFound, "beta");
        refused(make(&w, &tenant, "beta", "x", &[]).await, ErrorKind::NotFound, "beta");
        refused(make(&w, &tenant, "default", "x", &[]).await, ErrorKind::NotFound, "default");
        let before = w.fingerprint();
        for (key, value) in [
            ("ipv4.address", "192.168.7.1/24"),
            ("ipv4.routes", "198.51.100.0/24"),
            ("ipv4.nat.address", "198.51.100.1"),
            ("bridge.external_interfaces", "granted0"),
            ("raw.dnsmasq", "dhcp-option=6,192.0.2.1"),
        ] {
            let field = Some(format!("config.{key}"));
            let made = make(&w, &tenant, "acme", "x", &[(key, value)]).await;
            assert_eq!(refused(made, ErrorKind::Forbidden, "resource_edit").field, field);
            let changed = change(&w, &tenant, "acme", "lan", &[(key, value)]).await;
            assert_eq!(refused(changed, ErrorKind::Forbidden, "resource_edit").field, field);
        }
        let uplink = CreateNetwork {
            name: "up".into(),
            kind: NetworkKind::Macvlan,
            config: config(&[("parent", "granted0")]),
            ..Default::default()
        };
        refused(
            e.network_create(&tenant, "acme", uplink).await,
            ErrorKind::Forbidden,
            "interface of the host",
        );
        let forward =
            e.forward_create(&tenant, "acme", "lan", "198.51.100.7", UpdateForward::default()).await;
        refused(forward, ErrorKind::Forbidden, "address of the host");
        assert_eq!(w.fingerprint(), before);
        // What an administrator gave the network stays when the tenant changes the rest.
        change(&w, c, "acme", "lan", &[("ipv4.routes", "198.51.100.0/24")]).await.unwrap();
        change(&w, &tenant, "acme", "lan", &[("dns.domain", "other.example")]).await.unwrap();
        let mut without = e.network(c, "acme", "lan").unwrap().config.clone();
        without.remove("ipv4.routes");
        let update = UpdateNetwork { description: String::new(), config: without, if_version: None };
        let gone = e.network_update(&tenant, "acme", "lan", update).await;
        refused(gone, ErrorKind::Forbidden, "ipv4.routes");
        // Limits and rules of its own.
        make(&w, &tenant, "acme", "second", &[]).await.unwrap();
        refused(make(&w, &tenant, "acme", "third", &[]).await, ErrorKind::Quota, "limits.networks");
        e.acl_create(&tenant, "acme", "web", UpdateAcl::default()).await.unwrap();
        change(&w, &tenant, "acme", "lan", &[("security.acls", "web")]).await.unwrap();
        done(&w, e.network_rename(&tenant, "acme", "second", "tailscale0").await).await.unwrap();
        assert!(e.network(c, "acme", "tailscale0").unwrap().interface().starts_with("karst"));
        done(&w, e.network_delete(&tenant, "acme", "tailscale0").await).await.unwrap();
        // Who only looks changes nothing.
        let project = e.project(c, "acme", Permission::ProjectView).unwrap().id;
        let grants = vec![Grant { role: Role::Viewer, project: Some(project) }];
        let identity = Identity::Token { name: "viewer".into(), address: String::new() };
        let viewer = Context::new(Principal::of(PrincipalId(uuid::Uuid::from_u128(98)), identity, grants));
        assert_eq!(names(&w, &viewer, "acme"), ["lan"]);
        refused(make(&w, &viewer, "acme", "x", &[]).await, ErrorKind::Forbidden, "resource_edit");
        refused(e.acl_delete(&viewer, "acme", "web").await, ErrorKind::Forbidden, "resource_edit");
        let nobody = Context::new(Principal::anonymous());
        refused(make(&w, &nobody, "acme", "x", &[]).await, ErrorKind::Unauthenticated, "");
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}
