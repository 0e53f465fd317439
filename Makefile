# make demo and make test are all that a newcomer needs; make help lists the rest.
SHELL := /bin/bash
GO ?= go
BIN := $(CURDIR)/bin
TOOLS := $(CURDIR)/internal/tools/bin
# Tests and benchmarks look at etcd with etcdctl, as the independent eye, and come
# to agents with grpcurl, as the independent caller.
export HALLIGAN_ETCDCTL := $(TOOLS)/etcdctl
export HALLIGAN_GRPCURL := $(TOOLS)/grpcurl
# Tests run a real Kubernetes control plane from here.
export HALLIGAN_KUBE ?= $(BIN)/kube
# -buildvcs=false: a clone owned by somebody else builds all the same.
BUILD := $(GO) build -trimpath -buildvcs=false

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.PHONY: build
build: ## build every binary into bin/
	@mkdir -p $(BIN)
	$(BUILD) -o $(BIN)/ ./cmd/...

.PHONY: kube
kube: ## build a real Kubernetes control plane into a cache: ten minutes, once
	@GO=$(GO) internal/kube/build $(BIN)/kube

.PHONY: etcdctl grpcurl
etcdctl grpcurl: %: $(TOOLS)/% ## build etcdctl or grpcurl into internal/tools/bin

.PHONY: demo
demo: build $(if $(filter-out 0,$(KUBE)),kube) ## stage an outage and heal it through etcd, without an API server; KUBE=1: with a real one
	$(BIN)/halligan-lab demo --report $(BIN)/demo-report.html $(if $(filter-out 0,$(KUBE)),--kube)

.PHONY: test
test: build kube $(TOOLS)/etcdctl $(TOOLS)/grpcurl ## run all tests
	$(GO) test -buildvcs=false -timeout 15m $$($(GO) list ./... | grep -v /cmd/internal/lab$$)
	$(GO) test -buildvcs=false -timeout 15m ./cmd/internal/lab # alone: its storms take the whole machine

# What takes long in these is processes that are killed, elections and timeouts of
# etcd, where a race detector sees nothing; make test runs them.
PATIENT := ^(TestKill|TestKillBulk|TestLongNames|TestQuorumLost|TestQuorumLostMidAction|TestShared|TestSilentMember|TestShare|TestExpiry|TestLeaderLostMidAction|TestRunOnReadOnlyDisk|TestKilledAtEachStep|TestKilledInTheDriver|TestKillOnLedger|TestFaultsAtEachStep|TestEachByteOfTheSpool|TestDamage)$$

.PHONY: race
race: $(TOOLS)/etcdctl $(TOOLS)/grpcurl ## run the tests of concurrent code under the race detector
	$(GO) test -buildvcs=false -race -skip '$(PATIENT)' -timeout 20m ./agent ./agent/action ./agent/console ./agent/diagnose ./agent/door ./agent/etcd ./agent/journal ./agent/localapi ./agent/sshd ./agent/tunnel ./api/grpcdoor ./api/mtls ./api/mux ./api/verb ./audit/cast ./audit/ledger ./audit/mirror ./audit/record ./audit/sealed ./audit/service ./bastion/... \
		$(addprefix ./internal/,admission alarm daemonlog reload sshclient sshserver trust trust/bundle trust/credential trust/inforce ways)

.PHONY: bench
bench: build kube $(TOOLS)/etcdctl ## measure beside the raw references, as ratios
	$(GO) test -buildvcs=false -run '^$$' -bench . -benchtime 1x -timeout 30m ./agent/action ./agent/diagnose ./audit/sealed ./agent/sshd ./cmd/internal/lab ./cmd/internal/netlab

.PHONY: lint
lint: $(TOOLS)/staticcheck ## gofmt, go vet and staticcheck
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$unformatted" ]; then echo "gofmt would change:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(TOOLS)/staticcheck ./...

FUZZTIME ?= 20s
.PHONY: fuzz
fuzz: ## run every fuzzer for FUZZTIME, 20s
	@set -e; for p in $$($(GO) list ./...); do all=$$($(GO) test -list '^Fuzz' $$p); for f in $$(grep '^Fuzz' <<<"$$all"); do \
		echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x $$p; done; done

.PHONY: generate
generate: $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc ## write generated code and the snapshot of actions anew
	cd api && PATH=$(TOOLS):$$PATH buf lint && PATH=$(TOOLS):$$PATH buf generate
	$(GO) test ./agent/action -run '^TestSnapshot$$' -update

.PHONY: clean
clean: ## remove what was built
	rm -rf $(BIN) $(TOOLS)

# Tools have a module of their own, so that none of it reaches the product's.
$(TOOLS)/%: internal/tools/go.mod internal/tools/go.sum
	@mkdir -p $(TOOLS)
	cd internal/tools && $(BUILD) -o $(TOOLS)/ $$($(GO) list -f '{{.ImportPath}}' tool | grep -E '/$*(/v[0-9]+)?$$')
	@touch $@
